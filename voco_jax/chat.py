"""`voco chat --run DIR --image a.png --image b.png`: a conversation about pictures, answers as they come.

A line is a turn. These lines are not:

    /clear   begin a new conversation about the same pictures
    /help    say this
    /quit    end; so do an empty line, and the end of the input
"""

import re
import sys

from voco_jax.arguments import (
    add_answer_arguments,
    add_image_arguments,
    add_model_arguments,
    auto_of,
    load_model,
    sampling_of,
)
from voco_jax.ask import check_image_arguments, encode_arguments, note_images, saw_single_questions
from voco_jax.errors import UserError, one_line_errors
from voco_jax.options import Parser
from voco_jax.terminal import printable


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco chat", description=__doc__)
    add_model_arguments(parser)
    add_image_arguments(parser)
    add_answer_arguments(parser, max_new_tokens=256)
    args = parser.parse_args()
    sampling = sampling_of(args)
    check_image_arguments(args)
    model = load_model(args)
    auto = auto_of(args, model)
    images = encode_arguments(model, args)
    note_images(model, images)
    chat = model.chat(images, tokens=auto, max_new_tokens=args.max_new_tokens, sampling=sampling)
    asking = sys.stdin.isatty()
    if asking:
        print("/help lists what is not a question")
    while True:
        try:
            question = input("> " if asking else "").strip()
        except EOFError:
            break
        if not question or question == "/quit":
            break
        if not asking:
            print(f"> {printable(question)}")
        if question == "/help":
            print(__doc__.partition("\n\n")[2].rstrip())
            continue
        if question == "/clear":
            chat = model.chat(images, tokens=auto, max_new_tokens=args.max_new_tokens, sampling=sampling)
            continue
        if re.fullmatch("/[a-z]+", question):  # meant for another program; a question about it has more words
            print(f"error: {printable(question)}: expected /clear, /help or /quit", file=sys.stderr)
            continue
        if len(chat.turns) == 2 and saw_single_questions(model):
            print(f"note: {args.run} was trained on single questions: a second turn is new to it", file=sys.stderr)
        try:
            for piece in chat.stream(question):
                print(printable(piece, keep="\n\t"), end="", flush=True)
            print(flush=True)
        except UserError as error:  # the conversation is as it was
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
