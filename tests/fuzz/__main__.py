"""The command line of the suite; see the package's docstring."""

import argparse
import sys

from tqdm import tqdm

from tests.fuzz import TARGETS, target
from tests.fuzz import __doc__ as about
from tests.fuzz.harness import BAD, run, run_here


def main() -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="other cases (default: 0)")
    parser.add_argument("--case", type=int, help="one case alone, in this process")
    args = parser.parse_args()
    if unknown := set(args.kind) - TARGETS.keys():
        parser.error(f"expected kinds of {', '.join(TARGETS)}; found {', '.join(sorted(unknown))}")
    reports = []
    for name in args.kind or TARGETS:
        if args.case is not None:
            print(run_here(name, args.case, args.seed))
            continue
        count = max(1, round(target(name).count * args.share))
        with tqdm(total=count, desc=name, mininterval=1.0) as bar:

            def on_case(outcome, bar=bar, name=name):
                bar.update()
                if outcome.kind in BAD:
                    tqdm.write(
                        f"{name} {outcome.case}: {outcome.kind}, {outcome.seconds:.1f} s, "
                        f"{outcome.memory / 2**20:.0f} MiB: {outcome.what}\n{outcome.said}"
                    )

            reports.append(run(name, range(count), args.seed, on_case))
    for report in reports:
        print(report)
    sys.exit(any(report.bad for report in reports))


if __name__ == "__main__":
    main()
