"""Compares ways to train low-bit networks on the digits, over many seeds, and their cost.

    export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=/tmp/study_cache
    taskset -c 0 python benchmarks/study.py --work study --part 1/2 &
    taskset -c 1 python benchmarks/study.py --work study --part 2/2 &
    wait
    python benchmarks/study.py --work study --collect
    python benchmarks/study.py --report > tables.md

Two networks (PreResNet-8 with LIQ, a small ViT with LSQ) on two sets of data ('digits', and
'hard': 20 examples a class, a fifth of them with a wrong label) at 2, 3 and 4 bits. Each method has
four settings, chosen on the validation split by 4 seeds at 3 bits, and 16 other seeds for the final
figures. `--work` is where every part goes as soon as it is known: a process that was stopped goes
on there, and any number of processes may share it. `--collect` writes one JSON file of all parts;
`--report` prints its tables and draws `--plot`. `--quick` is a tiny study, for tests.
"""

import argparse
import json
import sys
from pathlib import Path

from study_collect import collect
from study_figures import Study
from study_parts import Parts, write
from study_plan import FULL, QUICK
from study_plot import save_plot
from study_run import work
from study_tables import tables

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / 'benchmarks' / 'results' / 'study_cpu.json'


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--work', type=Path, help='directory of the parts')
  parser.add_argument('--part', type=_part, default=(0, 1), metavar='I/N', help='of N processes')
  parser.add_argument('--data-dir', help='of tfds')
  parser.add_argument('--quick', action='store_true', help='a tiny study')
  parser.add_argument('--collect', action='store_true', help='write --results from --work')
  parser.add_argument('--report', action='store_true', help='print tables of --results, and plot')
  parser.add_argument('--results', type=Path, default=_RESULTS)
  parser.add_argument('--plot', type=Path, default=_ROOT / 'docs' / 'study.png')
  args = parser.parse_args(arguments)
  if args.work is None and (args.collect or not args.report):
    parser.error('name the directory of the parts: --work DIR')
  plan = QUICK if args.quick else FULL
  if args.collect:
    write(args.results, collect(plan, Parts(args.work)))
  elif not args.report:
    work(plan, Parts(args.work), args.part, args.data_dir)
  if args.report:
    study = Study.from_json(json.loads(args.results.read_text(encoding='utf-8')))
    save_plot(study, args.plot)
    print(tables(study))


def _part(text: str) -> tuple[int, int]:
  """A share of the work, from 0, and the number of shares."""
  first, _, count = text.partition('/')
  share = int(first) - 1, int(count or 0)
  if not 0 <= share[0] < share[1]:
    raise argparse.ArgumentTypeError(f'{text}: must be I/N with I from 1 to N.')
  return share


if __name__ == '__main__':
  main(sys.argv[1:])
