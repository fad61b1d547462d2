"""The process that renders a chat template, with limits on time and memory; `chat_templates.py` runs this file.

A template is a program. transformers' sandbox protects files and Python, but does not end an endless loop. Standard
input is JSON: the template, special tokens and conversations. Standard output is JSON: a text or an error for each.
"""

import json
import math
from pathlib import Path
import re
import resource
import sys
import time

SECONDS = 3  # of processor time
MEMORY = 2**28  # bytes, beyond what the libraries take
LONGEST = 2**20  # characters of a conversation


def main() -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    asked = json.load(sys.stdin)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel()))
    (taken,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(taken) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seconds = math.ceil(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    rendered = []
    for messages, asks in asked["conversations"]:
        try:
            options = {"chat_template": asked["template"], "tokenize": False, "add_generation_prompt": asks}
            text = tokenizer.apply_chat_template(messages, **options, **asked["special_tokens"])
            rendered.append([text, None] if len(text) <= LONGEST else [None, f"it gives {len(text)} characters"])
        except MemoryError:
            rendered.append([None, "it takes too much memory"])
        except Exception as error:  # of Jinja, or what the template itself raises
            rendered.append([None, " ".join(str(error).split())[:200] or type(error).__name__])
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
