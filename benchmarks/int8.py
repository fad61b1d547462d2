"""What storing memories in int8 costs: easy-VQA's test questions, answered from memories as they are, and rounded.

python -m benchmarks.int8 --run runs/easyvqa
"""

import argparse

import voco_jax
from voco_jax.api import Request
from voco_jax.data.sources import easyvqa
from voco_jax.data.turns import text_of
from voco_jax.errors import one_line_errors
from voco_jax.eval.scoring import normalize


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    args = parser.parse_args()
    model, records = voco_jax.load(args.run), easyvqa.load("test")
    bank = model.compress([record.images[0] for record in records])
    asked = [
        (i, text_of(turns[0]["value"]), turns[1]["value"]) for i, r in enumerate(records) for turns in r.conversations
    ]
    given = {}
    for name, stored in (("as computed", bank), ("int8", bank.to_int8())):
        one = stored.pictures()
        requests = [Request(question, one[i]) for i, question, _ in asked]
        given[name] = model.answers(requests, max_new_tokens=8, batch_size=256)
        right = sum(normalize(a) == normalize(truth) for a, (*_, truth) in zip(given[name], asked, strict=True))
        print(f"{name}: {stored.nbytes / len(records):,.0f} bytes a picture, {right:,} of {len(asked):,} right")
    other = sum(a != b for a, b in zip(*given.values(), strict=True))
    print(f"{other} answers differ")


if __name__ == "__main__":
    main()
