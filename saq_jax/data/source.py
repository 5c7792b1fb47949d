"""The batches drawn from a dataset, each a pure function of the step."""

import functools
import sys

import grain
import numpy as np

from saq_jax.data.datasets import Dataset
from saq_jax.data.records import Batch


def train_source(
  examples: Dataset,
  batch_size: int,
  *,
  seed: int,
  repeats: int = 1,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless training batches, as a pure function of the step.

  Step t takes the positions t * batch_size .. (t + 1) * batch_size - 1 of the stream

      perm(seed, 0), perm(seed, 1), perm(seed, 2), ...

  of whole epochs, each a new permutation of all examples: none is dropped, each comes once an epoch
  and an epoch may end within a batch. A process takes its own contiguous share of each batch, so
  the shares put end to end are the batch that one process alone would draw.

  With `repeats` r, an epoch has as many positions as before, but r of them in a row have the same
  example, each augmented anew (repeated augmentation, arXiv 1901.09335, as DeiT has it): one r-th
  of the examples comes in an epoch, drawn anew for each. Within a batch the first copies stand
  together, then the second ones, and so on: neighbours are different examples.

  The permutations come from Philox bits, whose stream NumPy keeps fixed across versions.

  Args:
    examples: The examples.
    batch_size: Examples a step over all processes; a multiple of `process_count`, at most N.
    seed: Any integer >= 0.
    repeats: r, at least 1.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    A dataset of batches {'image': uint8 [b, H, W, C], 'label': int32 [b]} with
    b = batch_size // process_count. `source[t]` is step t and `source[t:]` resumes there.

  Raises:
    ValueError: A batch size, process, seed or number of repeats that breaks the above.

  Example:
    >>> from saq_jax.data.datasets import Examples
    >>> examples = Examples(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32), 5)
    >>> source = train_source(examples, 2, seed=0)
    >>> epochs = np.concatenate([source[step]['label'] for step in range(5)])
    >>> sorted(epochs[:5].tolist()), sorted(epochs[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    >>> bool(np.all(source[3:][0]['label'] == source[3]['label']))
    True
  """
  share = _share(batch_size, process_index, process_count)
  count = len(examples)
  if batch_size > count:
    raise ValueError(f'batch_size {batch_size} exceeds the {count} examples: lower it')
  if seed < 0:
    raise ValueError(f'seed must be 0 or more, got {seed}')
  if repeats < 1:
    raise ValueError(f'repeats must be 1 or more, got {repeats}')

  # One element is one whole batch: grain's cost an element is then paid once a step.
  def take(step: int) -> Batch:
    # Python's integers: a step may be near the largest that 64 bits hold.
    epoch, start = divmod(int(step) * batch_size, count)
    places = np.arange(start, start + batch_size)
    places = places[np.argsort((places % count) % repeats, kind='stable')][share]
    indices = np.empty(len(places), np.int64)
    for turn in range(2):
      here = places // count == turn
      if here.any():
        order = _permutation(seed, epoch + turn, count)
        indices[here] = order[places[here] % count // repeats]
    first = epoch * count
    return examples.train_batch(indices, seed, [first + place for place in places.tolist()])

  return grain.MapDataset.range(sys.maxsize).map(take)


def eval_source(
  examples: Dataset, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
  """Returns every example exactly once, in order, in batches of one shape.

  The last batch is padded with zeros; every process has ceil(N / batch_size) batches, some of
  which may be padding alone.

  Args:
    examples: The examples.
    batch_size: Examples a batch over all processes; a multiple of `process_count`.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    A dataset of {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]} with
    b = batch_size // process_count; the mask is 1 for an example and 0 for padding and for a
    damaged example, where those are left out; then there is 'damaged' as well, bool [b].

  Raises:
    ValueError: A batch size or process that breaks the above.

  Example:
    >>> from saq_jax.data.datasets import Examples
    >>> examples = Examples(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32), 5)
    >>> [batch['mask'].tolist() for batch in eval_source(examples, 3)]
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
  """
  share = _share(batch_size, process_index, process_count)
  size = share.stop - share.start

  def take(batch: int) -> Batch:
    return _padded(examples, batch * batch_size + share.start, size)

  return grain.MapDataset.range(-(-len(examples) // batch_size)).map(take)


def _padded(examples: Dataset, start: int, size: int) -> Batch:
  """Returns the `size` examples from `start` on, with zeros and a zero mask past the last."""
  found = np.arange(min(start, len(examples)), min(start + size, len(examples)))
  batch = examples.eval_batch(found)
  mask = np.ones(len(found), np.float32)
  if 'damaged' in batch:
    mask -= batch['damaged']
  missing = size - len(found)
  return {
    name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    for name, array in {**batch, 'mask': mask}.items()
  }


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
  """Returns the part of a global batch that is a process's own."""
  if process_count <= 0:
    raise ValueError(f'process_count must be positive, got {process_count}')
  if not 0 <= process_index < process_count:
    raise ValueError(f'process_index {process_index} must be in 0..{process_count - 1}')
  if batch_size <= 0 or batch_size % process_count:
    raise ValueError(
      f'batch_size must be a positive multiple of the {process_count} processes, got {batch_size}'
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the order of an epoch's examples, int64 [count]."""
  bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
  # Sorting raw bits, because NumPy may change how it shuffles but not a bit generator's stream.
  return np.argsort(bits, kind='stable')
