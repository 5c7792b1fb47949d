"""What a setting may be: the error for one that cannot be, and limits of numbers."""

import dataclasses
import math
from typing import Any


class ConfigError(ValueError):
  """A configuration that cannot be run; the message says what to change."""


ABOVE_0 = math.nextafter(0.0, 1.0)


def within(default: Any, low: float, high: float = math.inf) -> Any:
  """A field that must be a finite number (or several) from `low` to `high`.

  Args:
    default: of the field.
    low: the least value.
    high: the largest one.

  Returns:
    What stands behind the field's type in a dataclass.
  """
  return dataclasses.field(default=default, metadata={'low': low, 'high': high})
