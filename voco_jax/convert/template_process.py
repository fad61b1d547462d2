"""A process that renders a chat template, and is ended when it takes too long or too much memory.

A template is a program: transformers' sandbox keeps it from files and from Python, not from loops without an end.
JSON comes on standard input: the template, the special tokens and conversations. What each gives, text or an error,
goes to standard output. `chat_templates.py` runs this file, and nothing else imports it.
"""

import json
import math
from pathlib import Path
import re
import resource
import sys
import time

SECONDS = 3  # of the processor, and
MEMORY = 2**28  # bytes, above what the libraries take
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
