"""The costs of an experiment, layer by layer, and the list of networks in docs/models.md."""

import json
import re
from pathlib import Path

import pytest

from saq_jax.analysis import cost_table
from saq_jax.analysis.model_list import entries, row

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments):
  code = cost_table.main(list(arguments))
  captured = capsys.readouterr()
  assert 'Traceback' not in captured.err
  return code, captured


@pytest.mark.parametrize(
  ('config', 'total'),
  [
    ('preresnet20_4bit_cifar100', '674.6M'),
    ('preresnet20_3bit_cifar100', '392.1M'),
    ('mobilenetv2_4bit_cifar100', '1508.9M'),
    ('mobilenetv2_3bit_cifar100', '877.1M'),
    ('resnet18_4bit', '34.7G'),
    ('resnet18_2bit', '14.4G'),
    ('mobilenetv2_4bit', '5.4G'),  # The paper prints 5.3G: docs/models.md.
  ],
)
def test_the_configs_cost_what_the_paper_says(capsys, config, total):
  code, captured = run(capsys, '--config', str(ROOT / 'configs' / f'{config}.py'))
  assert code == 0
  footer = next(line for line in captured.out.splitlines() if re.match(r'. all ', line))
  assert total in footer


def test_json_has_every_layer_and_adds_up(capsys, tmp_path):
  """ResNet-18 at 3 bits against sums from its published layer sizes."""
  path = tmp_path / 'costs.json'
  flags = ['--config', str(ROOT / 'configs' / 'resnet18_3bit.py'), f'--json={path}']
  code, captured = run(capsys, *flags, '--config.quant.act_bits=5')
  assert code == 0
  figures = json.loads(path.read_text())
  layers = {layer['path']: layer for layer in figures['layers']}
  assert len(layers) == 1 + 16 + 3 + 1
  first = {'path': 'conv1', 'macs': 7 * 7 * 3 * 64 * 112**2, 'weight_bits': 8, 'act_bits': 8}
  assert layers['conv1'] == {
    **first, 'bops': first['macs'] * 64, 'weight_bytes': 7 * 7 * 3 * 64
  }  # fmt: skip
  last = layers['layer4_1/conv2']
  assert (last['macs'], last['weight_bits'], last['act_bits']) == (9 * 512**2 * 49, 3, 5)
  assert last['weight_bytes'] == 9 * 512**2 * 3 // 8
  for total, of in (('macs', 'macs'), ('bops', 'bops'), ('weight_bytes', 'weight_bytes')):
    assert figures[total] == sum(layer[of] for layer in layers.values())
  assert figures['parameters'] == 11_689_512
  # Beside the codes: norms (scale, bias, mean, variance), the bias, a scale a weight and an input.
  norms = 64 + 2 * 2 * (64 + 128 + 256 + 512) + 128 + 256 + 512
  floats = 4 * norms + 1000 + 21 + 20
  assert figures['model_bytes'] == figures['weight_bytes'] + 4 * floats
  for words in ('layer4_1/conv2', '3/5', '11,689,512 parameters'):
    assert words in captured.out


def test_products_of_activations_have_no_weights(capsys, tmp_path):
  path = tmp_path / 'costs.json'
  flags = ['--config', str(ROOT / 'configs' / 'deit_ti_4bit.py'), f'--json={path}']
  assert run(capsys, *flags, '--config.model.depth=1')[0] == 0
  layers = json.loads(path.read_text())['layers']
  without = [layer for layer in layers if layer['weight_bytes'] is None]
  assert len(without) == 2
  assert {layer['macs'] for layer in without} == {197**2 * 192}
  assert {(layer['weight_bits'], layer['act_bits']) for layer in without} == {(4, 4)}


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--config=nowhere.py'], 'no such file'),
    (['--bits=4'], "'--bits'"),
    (['--workdir=here'], '--workdir is not a flag'),
    (['--json'], '--json needs a value'),
    (['--config.data.name=nothing_of_the_kind'], 'nothing_of_the_kind'),
    (['--config.data.name=imagenet2012'], 'config.data.image_size'),
    (['--config.model.name=vit', '--config.model.size=Ti'], 'do not tile'),
  ],
)
def test_wrong_input_is_one_line(capsys, flags, words):
  code, captured = run(capsys, *flags)
  assert code == 2
  assert len(captured.err.strip().splitlines()) == 1
  assert words in captured.err


def test_a_float_network_weighs_four_bytes_a_weight(tmp_path, capsys):
  path = tmp_path / 'costs.json'
  none = [f'--config.quant.{name}=None' for name in ('bits', 'act_bits', 'first_bits', 'last_bits')]
  assert run(capsys, f'--json={path}', *none)[0] == 0
  figures = json.loads(path.read_text())
  assert figures['weight_bytes'] == sum(layer['weight_bytes'] for layer in figures['layers'])
  assert {(x['weight_bits'], x['act_bits']) for x in figures['layers']} == {(32, 32)}
  assert figures['model_bytes'] > figures['weight_bytes'] > 4 * 0.9 * figures['parameters']


def test_help(capsys):
  code, captured = run(capsys, '--help')
  assert code == 0
  assert '--json FILE' in captured.out


def test_docs_list_every_network_as_it_is():
  text = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
  listed = list(entries())
  rows = [line for line in text.splitlines() if '| `--config.model' in line]
  assert [line.split(' | ')[0].lstrip('| ') for line in rows] == [e.label for e in listed]
  for entry, line in zip(listed, rows, strict=True):
    assert f'`{entry.flags}`' in line
    if entry.label in ('PreResNet-20', 'ResNet-18', 'ViT-Ti/32', 'DeiT-Ti, distilled'):
      assert row(entry) == line
