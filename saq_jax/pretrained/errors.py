"""The one error of this part of the package, and the tables that its messages hold."""

from collections.abc import Sequence


class PretrainedError(ValueError):
  """Weights that cannot be read, or are not those of the model; the message says how to mend it."""


def table(rows: Sequence[Sequence[str]], heading: Sequence[str]) -> str:
  """Lays out rows in columns.

  Args:
    rows: of as many words as the heading has.
    heading: of the columns.

  Returns:
    Lines, each after two spaces.

  Example:
    >>> print(table([('fc.weight', '10x4')], ('name', 'shape')))
      name       shape
      fc.weight  10x4
  """
  shown = [tuple(heading), *map(tuple, rows)]
  widths = [max(len(row[i]) for row in shown) for i in range(len(heading))]
  lines = [
    '  ' + '  '.join(f'{word:<{width}}' for word, width in zip(row, widths)).rstrip()
    for row in shown
  ]
  return '\n'.join(lines)


def shape_words(shape: Sequence[int]) -> str:
  """Writes a shape.

  Args:
    shape: of an array.

  Returns:
    '3x3x16', and 'scalar' for that of a scalar.
  """
  return 'x'.join(map(str, shape)) or 'scalar'
