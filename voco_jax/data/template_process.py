"""The process that renders a chat template, with limits on time and memory; `template_reader.py` runs this file.

A template is a program. transformers' sandbox protects files and Python, but does not end an endless loop. Standard
input is JSON: the template, its variables and conversations. Standard output is JSON: for each a text, the places in it
that the template's `{% generation %}` marks, and an error (null for none).
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
    from transformers.utils.chat_template_utils import render_jinja_template

    asked = json.load(sys.stdin)
    marks = re.search(r"\{%-?\s*generation\s*-?%\}", asked["template"]) is not None
    options = {"chat_template": asked["template"], "return_assistant_tokens_mask": marks, **asked["variables"]}
    (taken,) = re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(taken) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    seconds = math.ceil(time.process_time()) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    rendered: list[list] = []
    for messages, asks in asked["conversations"]:
        try:
            found: tuple = render_jinja_template([messages], add_generation_prompt=asks, **options)  # type: ignore
            texts, spans = found
            if len(texts[0]) > LONGEST:
                rendered.append([None, [], f"it gives {len(texts[0])} characters"])
            else:
                rendered.append([texts[0], spans[0] if spans else [], None])
        except MemoryError:
            rendered.append([None, [], "it takes too much memory"])
        except Exception as error:  # of Jinja, or what the template itself raises
            rendered.append([None, [], " ".join(str(error).split())[:200] or type(error).__name__])
    json.dump(rendered, sys.stdout)


if __name__ == "__main__":
    main()
