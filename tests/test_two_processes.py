"""Two processes on loopback share the data: disjoint, each epoch whole, and one global batch."""

import sys
import textwrap

import numpy as np
import pytest
from local_datasets import prepare
from runs import succeed

from saq_jax.data.datasets import load_records
from saq_jax.data.resize import Resizing
from saq_jax.data.source import train_source

COUNT, BATCH, STEPS = 24, 8, 6

PROCESS = (
  textwrap.dedent("""
  import sys
  import jax, numpy as np
  from saq_jax.data.datasets import load_records
  from saq_jax.data.loader import Loader, Reading
  from saq_jax.data.resize import Resizing
  from saq_jax.data.source import eval_source, train_source
  from saq_jax.training.sharding import make_mesh, to_devices

  def main(port, index, data_dir, out, workers):
    jax.distributed.initialize(f'127.0.0.1:{port}', 2, index, initialization_timeout=120)
    shares = {'process_index': jax.process_index(), 'process_count': jax.process_count()}
    records = load_records('imagenet2012', 'train', data_dir, Resizing(8, 10))
    mesh = make_mesh()
    source = train_source(records, BATCH, seed=5, **shares)
    sums = jax.jit(lambda x: x.astype('int32').sum((1, 2, 3)))
    seen, whole = [], []

    def transfer(batch):
      seen.append({name: np.array(array) for name, array in batch.items()})
      return to_devices(batch, mesh)

    with Loader(source, 0, STEPS, transfer, Reading(workers)) as batches:
      for batch in batches:
        assert batch['image'].shape == (BATCH, 8, 8, 3)
        whole.append(jax.experimental.multihost_utils.process_allgather(
          sums(batch['image']), tiled=True))
    held = eval_source(records, 10, **shares)
    masks = np.concatenate([held[i]['mask'] for i in range(len(held))])
    labels = np.concatenate([held[i]['label'] for i in range(len(held))])
    np.savez(
      out, whole=np.stack(whole), eval_mask=masks, eval_label=labels,
      **{name: np.stack([b[name] for b in seen]) for name in seen[0]},
    )

  if __name__ == '__main__':
    import jax.experimental.multihost_utils
    port, index, data_dir, out, workers = sys.argv[1:]
    main(port, int(index), data_dir, out, int(workers))
""")
  .replace('BATCH', str(BATCH))
  .replace('STEPS', str(STEPS))
)


@pytest.fixture(scope='module')
def shares(tmp_path_factory, user_env):
  """What each process saw, and the records; the second one with a worker process."""
  folder = tmp_path_factory.mktemp('two')
  prepare('imagenet2012', folder, train=COUNT)
  (folder / 'process.py').write_text(PROCESS)

  def words(port, index):
    script = sys.executable, folder / 'process.py'
    return [*script, port, index, folder, folder / f'{index}.npz', index]

  succeed(2, words, {**user_env, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'})
  records = load_records('imagenet2012', 'train', str(folder), Resizing(8, 10))
  return [np.load(folder / f'{i}.npz') for i in range(2)], records


def test_each_epoch_is_covered_once_by_disjoint_shares(shares):
  (one, two), records = shares
  # Every image of the set is another one: its pixels say which it is, through a wide crop too.
  alone = train_source(records, BATCH, seed=5)
  wanted = [alone[step] for step in range(STEPS)]
  for name in ('image', 'label'):
    together = np.concatenate([one[name], two[name]], 1)
    np.testing.assert_array_equal(together, np.stack([batch[name] for batch in wanted]))


class Numbered:
  """Examples that tell their index, to count them."""

  num_classes, image_shape, decodes = COUNT, (1, 1, 1), False

  def __len__(self):
    return COUNT

  def train_batch(self, indices, seed, positions):
    return {'label': indices.astype(np.int32)}


def test_the_order_that_the_processes_share_has_every_example_once_an_epoch(shares):
  (one, two), records = shares
  order = train_source(Numbered(), BATCH, seed=5)
  indices = np.stack([order[step]['label'] for step in range(STEPS)])
  half = BATCH // 2
  for share, mine in ((one, indices[:, :half]), (two, indices[:, half:])):
    labels = np.array([records.records[int(i)]['label'] for i in mine.ravel()])
    np.testing.assert_array_equal(share['label'].ravel(), labels)
  for epoch in (indices[:3], indices[3:]):
    mine, yours = set(epoch[:, :half].ravel()), set(epoch[:, half:].ravel())
    assert mine.isdisjoint(yours)
    assert mine | yours == set(range(COUNT))


def test_the_global_array_is_the_same_on_both(shares):
  (one, two), _ = shares
  np.testing.assert_array_equal(one['whole'], two['whole'])
  own = np.concatenate([one['image'], two['image']], 1).astype(np.int32).sum((2, 3, 4))
  np.testing.assert_array_equal(one['whole'], own)


def test_evaluation_counts_every_example_once(shares):
  (one, two), records = shares
  labels = np.concatenate([s['eval_label'][s['eval_mask'] == 1] for s in (one, two)])
  assert sorted(labels) == sorted(int(r['label']) for r in records.records)
