"""The batches drawn from a dataset, each a pure function of the step."""

import functools
import sys
from collections.abc import Iterator

import grain
import numpy as np

from saq_jax.data.datasets import Dataset
from saq_jax.data.records import Batch


def train_source(
  examples: Dataset,
  batch_size: int,
  *,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Returns the endless training batches, as a pure function of the step.

  Step t takes the positions t * batch_size .. (t + 1) * batch_size - 1 of the stream

      perm(seed, 0), perm(seed, 1), perm(seed, 2), ...

  of whole epochs, each a new permutation of all examples: none is dropped, each comes once an epoch
  and an epoch may end within a batch. A process takes its own contiguous share of each batch, so
  the shares put end to end are the batch that one process alone would draw.

  The permutations come from Philox bits, whose stream NumPy keeps fixed across versions.

  Args:
    examples: The examples.
    batch_size: Examples a step over all processes; a multiple of `process_count`, at most N.
    seed: Any integer >= 0.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    A dataset of batches {'image': uint8 [b, H, W, C], 'label': int32 [b]} with
    b = batch_size // process_count. `source[t]` is step t and `source[t:]` resumes there.

  Raises:
    ValueError: A batch size, process or seed that breaks the above.

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

  # One element is one whole batch: grain's cost an element is then paid once a step.
  def take(step: int) -> Batch:
    # Python's integers: a step may be near the largest that 64 bits hold.
    epoch, start = divmod(int(step) * batch_size + share.start, count)
    stop = start + share.stop - share.start
    indices = _permutation(seed, epoch, count)[start:stop]
    if stop > count:
      indices = np.concatenate([indices, _permutation(seed, epoch + 1, count)[: stop - count]])
    return examples.train_batch(indices, seed, [epoch * count + i for i in range(start, stop)])

  return grain.MapDataset.range(sys.maxsize).map(take)


def eval_batches(
  examples: Dataset, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
  """Returns every example exactly once, in order, in batches of one shape.

  The last batch is padded with zeros; every process yields ceil(N / batch_size) batches, some of
  which may be padding alone.

  Args:
    examples: The examples.
    batch_size: Examples a batch over all processes; a multiple of `process_count`.
    process_index: This process, 0..process_count - 1.
    process_count: The number of processes that share each batch.

  Returns:
    An iterator over {'image': uint8 [b, H, W, C], 'label': int32 [b], 'mask': float32 [b]} with
    b = batch_size // process_count; the mask is 1 for an example and 0 for padding.

  Raises:
    ValueError: A batch size or process that breaks the above.

  Example:
    >>> from saq_jax.data.datasets import Examples
    >>> examples = Examples(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32), 5)
    >>> [batch['mask'].tolist() for batch in eval_batches(examples, 3)]
    [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
  """
  # Checked here and not in a generator, which would raise at the first batch only.
  share = _share(batch_size, process_index, process_count)
  starts = range(share.start, share.start + len(examples), batch_size)
  return (_padded(examples, start, share.stop - share.start) for start in starts)


def _padded(examples: Dataset, start: int, size: int) -> Batch:
  """Returns the `size` examples from `start` on, with zeros and a zero mask past the last."""
  found = np.arange(start, min(start + size, len(examples)))
  missing = size - len(found)
  shape = (size, *examples.image_shape)
  if not len(found):
    empty = np.zeros(size, np.int32)
    return {'image': np.zeros(shape, np.uint8), 'label': empty, 'mask': np.zeros(size, np.float32)}
  batch = examples.eval_batch(found)
  return {
    'image': np.pad(batch['image'], [(0, missing), (0, 0), (0, 0), (0, 0)]),
    'label': np.pad(batch['label'], (0, missing)),
    'mask': np.pad(np.ones(len(found), np.float32), (0, missing)),
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


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
  """Returns the order of an epoch's examples, int64 [count]."""
  bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
  # Sorting raw bits, because NumPy may change how it shuffles but not a bit generator's stream.
  return np.argsort(bits, kind='stable')
