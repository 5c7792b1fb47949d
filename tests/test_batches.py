"""Tests of the training and evaluation batches: coverage, resumption, shares and padding."""

import grain
import numpy as np
import pytest

from saq_jax.data.datasets import Examples
from saq_jax.data.source import eval_source, train_source

_COUNT = 23


@pytest.fixture(scope='module')
def examples() -> Examples:
  """Examples whose image and label both tell their index."""
  index = np.arange(_COUNT)
  images = np.broadcast_to(index[:, None, None, None], (_COUNT, 2, 3, 1)).astype(np.uint8)
  return Examples(images, index.astype(np.int32), _COUNT)


def _labels(source: grain.MapDataset, steps: int) -> np.ndarray:
  return np.concatenate([source[step]['label'] for step in range(steps)])


@pytest.mark.parametrize('batch_size', [1, 5, 22, 23])
def test_every_epoch_holds_every_example_once(examples: Examples, batch_size: int) -> None:
  # Epochs end within batches: 23 is prime.
  stream = _labels(train_source(examples, batch_size, seed=0), 4 * _COUNT)
  epochs = stream[: len(stream) // _COUNT * _COUNT].reshape(-1, _COUNT)
  assert len(epochs) >= 4
  np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(_COUNT), epochs.shape))
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_stream_does_not_depend_on_the_batch_size(examples: Examples) -> None:
  by_one, by_four = (train_source(examples, size, seed=1) for size in (1, 4))
  np.testing.assert_array_equal(_labels(by_one, 96), _labels(by_four, 24))


def test_shuffle_is_uniform() -> None:
  # Each example's mean rank over E epochs has deviation sqrt((N**2 - 1) / 12 / E).
  count, epochs = 10, 4000
  small = Examples(np.zeros((count, 1, 1, 1), np.uint8), np.arange(count, dtype=np.int32), count)
  order = _labels(train_source(small, count, seed=3), epochs).reshape(epochs, count)
  mean_rank = np.argsort(order, axis=1).mean(axis=0)
  assert np.abs(mean_rank - (count - 1) / 2).max() < 5 * np.sqrt((count**2 - 1) / 12 / epochs)


def test_images_and_labels_go_together(examples: Examples) -> None:
  batch = train_source(examples, 5, seed=0)[7]
  assert (batch['image'].shape, batch['image'].dtype) == ((5, 2, 3, 1), np.uint8)
  assert (batch['label'].shape, batch['label'].dtype) == ((5,), np.int32)
  np.testing.assert_array_equal(batch['image'][:, 1, 2, 0], batch['label'])


def test_batches_depend_on_seed_and_step_alone(examples: Examples) -> None:
  one, same, other = (train_source(examples, 8, seed=seed) for seed in (0, 0, 1))
  backwards = [same[step]['label'] for step in reversed(range(9))][::-1]
  np.testing.assert_array_equal(_labels(one, 9), np.concatenate(backwards))
  assert np.any(_labels(one, 9) != _labels(other, 9))


def test_stream_is_the_recorded_one(examples: Examples) -> None:
  # Recorded with NumPy 2.4: a run must resume identically after an upgrade.
  assert train_source(examples, 8, seed=0)[2]['label'].tolist() == [2, 16, 10, 6, 13, 12, 4, 13]


@pytest.mark.parametrize('start', [0, 1, 2, 5, 100, 10**12])
def test_resumes_at_any_step(examples: Examples, start: int) -> None:
  source = train_source(examples, 8, seed=0)
  resumed = iter(source[start:].to_iter_dataset(grain.ReadOptions(num_threads=2)))
  for step in range(start, start + 5):
    np.testing.assert_array_equal(next(resumed)['label'], source[step]['label'])


@pytest.mark.parametrize('process_count', [2, 3])
def test_shares_put_end_to_end_are_the_global_batch(examples: Examples, process_count: int) -> None:
  whole = train_source(examples, 6, seed=0)
  shares = [
    train_source(examples, 6, seed=0, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  for step in range(30):
    together = np.concatenate([share[step]['label'] for share in shares])
    np.testing.assert_array_equal(together, whole[step]['label'])


def test_two_processes_split_an_epoch() -> None:
  labels = np.arange(24, dtype=np.int32)
  even = Examples(np.zeros((24, 1, 1, 1), np.uint8), labels, 24)
  mine, yours = (
    set(_labels(train_source(even, 8, seed=0, process_index=i, process_count=2), 3).tolist())
    for i in (0, 1)
  )
  assert mine.isdisjoint(yours)
  assert mine | yours == set(range(24))


@pytest.mark.parametrize('batch_size', [1, 4, 22, 23, 24, 100])
def test_evaluation_yields_every_example_once(examples: Examples, batch_size: int) -> None:
  batches = list(eval_source(examples, batch_size))
  assert len(batches) == -(-_COUNT // batch_size)
  for batch in batches:
    assert batch['image'].shape == (batch_size, 2, 3, 1)
    assert [batch[key].dtype for key in ('image', 'label', 'mask')] == [
      np.uint8,
      np.int32,
      np.float32,
    ]
  image, label, mask = (
    np.concatenate([batch[key] for batch in batches]) for key in ('image', 'label', 'mask')
  )
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < _COUNT)
  np.testing.assert_array_equal(label[:_COUNT], np.arange(_COUNT))
  np.testing.assert_array_equal(image[:_COUNT], examples.images)
  assert not image[_COUNT:].any()
  assert not label[_COUNT:].any()


def test_evaluation_in_processes_yields_as_many_batches_in_each(examples: Examples) -> None:
  # 23 = 2 * 9 + 5: the last process has nothing but padding left in the last batch.
  shares = [list(eval_source(examples, 9, process_index=i, process_count=3)) for i in range(3)]
  assert [len(share) for share in shares] == [3, 3, 3]
  assert shares[2][-1]['mask'].tolist() == [0, 0, 0]
  for global_batch, batches in zip(eval_source(examples, 9), zip(*shares)):
    for key, whole in global_batch.items():
      np.testing.assert_array_equal(np.concatenate([batch[key] for batch in batches]), whole)


@pytest.mark.parametrize('draw', [train_source, eval_source])
@pytest.mark.parametrize(
  ('batch_size', 'process', 'message'),
  [
    (0, (0, 1), 'positive multiple of the 1 processes, got 0'),
    (-2, (0, 2), 'positive multiple of the 2 processes, got -2'),
    (5, (0, 2), 'positive multiple of the 2 processes, got 5'),
    (4, (2, 2), r'process_index 2 must be in 0\.\.1'),
    (4, (-1, 2), r'process_index -1 must be in 0\.\.1'),
    (4, (0, 0), 'process_count must be positive, got 0'),
  ],
)
def test_wrong_sizes(
  examples: Examples, draw: object, batch_size: int, process: tuple[int, int], message: str
) -> None:
  seed = {'seed': 0} if draw is train_source else {}
  with pytest.raises(ValueError, match=message):
    draw(examples, batch_size, process_index=process[0], process_count=process[1], **seed)


def test_training_batch_larger_than_the_data(examples: Examples) -> None:
  with pytest.raises(ValueError, match='batch_size 24 exceeds the 23 examples: lower it'):
    train_source(examples, 24, seed=0)


def test_negative_seed(examples: Examples) -> None:
  with pytest.raises(ValueError, match='seed must be 0 or more, got -1'):
    train_source(examples, 8, seed=-1)


# Repeated augmentation.


class Positions:
  """Examples whose batch tells index and position."""

  image_shape, decodes = (1, 1, 1), False

  def __init__(self, count: int) -> None:
    self.count = self.num_classes = count

  def __len__(self) -> int:
    return self.count

  def train_batch(self, indices, seed, positions):
    return {'label': indices, 'position': np.array(positions)}


@pytest.mark.parametrize(('count', 'batch_size', 'repeats'), [(24, 6, 3), (23, 7, 3), (10, 4, 2)])
def test_an_epoch_has_its_first_examples_several_times(count, batch_size, repeats):
  source = train_source(Positions(count), batch_size, seed=2, repeats=repeats)
  once = train_source(Positions(count), batch_size, seed=2)
  steps = 3 * count
  drawn, order = (
    {
      int(p): int(i)
      for step in range(steps)
      for p, i in zip(s[step]['position'], s[step]['label'], strict=True)
    }
    for s in (source, once)
  )
  # Every position of the stream comes once, whatever its place in a batch.
  assert sorted(drawn) == list(range(steps * batch_size))
  for position, index in drawn.items():
    epoch, place = divmod(position, count)
    assert index == order[epoch * count + place // repeats]


def test_copies_are_apart_within_a_batch() -> None:
  source = train_source(Positions(60), 12, seed=2, repeats=3)
  for step in range(10):
    labels = source[step]['label']
    assert np.all(labels[::2] != labels[1::2])  # which are mixed with each other
    for copy in range(3):
      assert len(set(labels[4 * copy : 4 * copy + 4])) == 4


def test_shares_of_repeated_examples_are_the_global_batch() -> None:
  whole = train_source(Positions(30), 6, seed=1, repeats=3)
  shares = [
    train_source(Positions(30), 6, seed=1, repeats=3, process_index=i, process_count=2)
    for i in range(2)
  ]
  for step in range(12):
    for name in ('label', 'position'):
      together = np.concatenate([share[step][name] for share in shares])
      np.testing.assert_array_equal(together, whole[step][name])


def test_too_few_repeats_raise(examples: Examples) -> None:
  with pytest.raises(ValueError, match='repeats must be 1 or more, got 0'):
    train_source(examples, 4, seed=0, repeats=0)
