"""Makes tests/reference/authors_steps.npz: the authors' algorithm in PyTorch, in float64.

Run with PyTorch installed, from the root of the repository: python tests/make_authors_record.py

Written from the description of the networks and of the step in ziplab/SAQ; see authors_networks
for what both sides begin from. Of each tensor the record has the norm of its change over all
steps, and the product of the change with a fixed direction.
"""

import authors_networks as nets
import numpy as np
import torch
from torch.nn import functional as F

RHO, LR, MOMENTUM, DECAY = 0.4, 0.01, 0.9, 1e-4
BITS, END_BITS = 4, 8


class Round(torch.autograd.Function):
  """Rounding to multiples of 1/n; the gradient passes."""

  @staticmethod
  def forward(ctx, x, n):
    return torch.round(x * n) / n

  @staticmethod
  def backward(ctx, g):
    return g, None


class Net:
  """The tensors of one network by name, made when first asked for, and its layers."""

  def __init__(self, case):
    self.case = case
    self.params, self.stats = {}, {}
    self.quantized, self.eps = {}, {}

  def _made(self, store, name, shape):
    if name not in store:
      value = torch.tensor(nets.first_value(self.case, name, shape))
      store[name] = value.requires_grad_(store is self.params)
    return store[name]

  def _weight(self, name, shape, bits, normalize):
    w = self._made(self.params, f'{name}.weight', shape)
    clip = self._made(self.params, f'{name}.weight_clip_value', (1,)).abs()
    if normalize:
      w = (w - w.detach().mean()) / w.detach().std()
    unit = (torch.clamp(w / clip, -1, 1) + 1) / 2
    q = (Round.apply(unit, 2**bits - 1) * 2 - 1) * clip
    self.quantized[f'{name}.weight'] = q
    return q + self.eps.get(f'{name}.weight', 0.0)

  def _input(self, x, name, bits):
    clip = self._made(self.params, f'{name}.activation_clip_value', (1,)).abs()
    return x if bits is None else Round.apply(torch.clamp(x / clip, 0, 1), 2**bits - 1) * clip

  def conv(self, x, name, out, size, stride=1, groups=1, first=False):
    shape = (out, x.shape[1] // groups, size, size)
    w = self._weight(name, shape, END_BITS if first else BITS, normalize=True)
    x = self._input(x, name, None if first else BITS)
    return F.conv2d(x, w, None, stride, size // 2, groups=groups)

  def norm(self, x, name):
    shape = (x.shape[1],)
    affine = [self._made(self.params, f'{name}.{leaf}', shape) for leaf in ('weight', 'bias')]
    mean, var = (
      self._made(self.stats, f'{name}.running_{leaf}', shape) for leaf in ('mean', 'var')
    )
    return F.batch_norm(x, mean, var, *affine, training=True, momentum=0.1, eps=1e-5)

  def last(self, x, name):
    x = self._input(x.mean((2, 3)), name, END_BITS)
    w = self._weight(name, (nets.CLASSES, x.shape[1]), END_BITS, normalize=False)
    return F.linear(x, w, self._made(self.params, f'{name}.bias', (nets.CLASSES,)))


def resnet(net, x, blocks, bottleneck):
  x = F.relu(net.norm(net.conv(x, 'conv1', 64, 7, 2, first=True), 'bn1'))
  x = F.max_pool2d(x, 3, 2, 1)
  for stage in range(4):
    for i in range(blocks[stage]):
      at, c = f'layer{stage + 1}.{i}', 64 * 2**stage
      stride, out = (2 if stage and not i else 1), c * (4 if bottleneck else 1)
      short = x
      if stride > 1 or x.shape[1] != out:
        short = net.conv(x, f'{at}.downsample.0', out, 1, stride)
        short = net.norm(short, f'{at}.downsample.1')
      if bottleneck:
        y = F.relu(net.norm(net.conv(x, f'{at}.conv1', c, 1), f'{at}.bn1'))
        y = F.relu(net.norm(net.conv(y, f'{at}.conv2', c, 3, stride), f'{at}.bn2'))
        y = net.norm(net.conv(y, f'{at}.conv3', out, 1), f'{at}.bn3')
      else:
        y = F.relu(net.norm(net.conv(x, f'{at}.conv1', c, 3, stride), f'{at}.bn1'))
        y = net.norm(net.conv(y, f'{at}.conv2', out, 3), f'{at}.bn2')
      x = F.relu(y + short)
  return net.last(x, 'fc')


STAGES = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]


def mobilenetv2(net, x):
  x = F.relu6(net.norm(net.conv(x, 'conv1', 32, 3, 2, first=True), 'bn1'))
  for stage, (expand, out, blocks) in enumerate(STAGES, 1):
    for i in range(blocks):
      at, stride = f'layer{stage}.{i}', 2 if i == 0 and stage in (2, 3, 4, 6) else 1
      y, c = x, x.shape[1] * expand
      if expand > 1:
        y = F.relu6(net.norm(net.conv(y, f'{at}.conv1', c, 1), f'{at}.bn1'))
      y = F.relu6(net.norm(net.conv(y, f'{at}.conv2', c, 3, stride, groups=c), f'{at}.bn2'))
      y = net.norm(net.conv(y, f'{at}.conv3', out, 1), f'{at}.bn3')
      x = x + y if stride == 1 and x.shape[1] == out else y
  return net.last(F.relu6(net.norm(net.conv(x, 'conv2', 1280, 1), 'bn2')), 'fc')


def mobilenetv2_cifar(net, x):
  x = F.relu(net.norm(net.conv(x, 'conv1', 32, 3, first=True), 'bn1'))
  n = 0
  for stage, (expand, out, blocks) in enumerate(STAGES, 1):
    for i in range(blocks):
      at, stride = f'layers.{n}', 2 if i == 0 and stage in (3, 4, 6) else 1
      c, n = x.shape[1] * expand, n + 1
      y = F.relu(net.norm(net.conv(x, f'{at}.conv1', c, 1), f'{at}.bn1'))
      y = F.relu(net.norm(net.conv(y, f'{at}.conv2', c, 3, stride, groups=c), f'{at}.bn2'))
      y = net.norm(net.conv(y, f'{at}.conv3', out, 1), f'{at}.bn3')
      if stride == 1 and x.shape[1] != out:
        x = net.norm(net.conv(x, f'{at}.shortcut.0', out, 1), f'{at}.shortcut.1')
      x = x + y if stride == 1 else y
  return net.last(F.relu(net.norm(net.conv(x, 'conv2', 1280, 1), 'bn2')), 'linear')


FORWARD = {
  'resnet18': lambda net, x: resnet(net, x, (2, 2, 2, 2), bottleneck=False),
  'resnet50': lambda net, x: resnet(net, x, (3, 4, 6, 3), bottleneck=True),
  'mobilenetv2': mobilenetv2,
  'mobilenetv2_cifar': mobilenetv2_cifar,
}


def gradients(loss, tensors):
  """By name, of those that the loss depends on."""
  found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
  return {name: g for name, g in zip(tensors, found) if g is not None}


def shifted_parameters(net):
  """What is perturbed in place: biases, norms and clips of activations."""
  weights = net.quantized.keys()
  return {
    name: p
    for name, p in net.params.items()
    if name not in weights and not name.endswith('weight_clip_value')
  }


def step(net, forward, momenta, images, labels):
  """One step of the authors' algorithm: (clean loss, perturbed loss, norm)."""
  net.eps = {}
  clean = F.cross_entropy(forward(net, images), labels)
  g = gradients(clean, net.quantized | shifted_parameters(net))
  norm = torch.stack([x.norm() for x in g.values()]).norm()
  eps = {name: RHO / (norm + 1e-12) * x for name, x in g.items()}
  before = {name: p.detach().clone() for name, p in net.params.items()}
  with torch.no_grad():
    for name in eps.keys() - net.quantized.keys():
      net.params[name] += eps[name]
  net.eps = {name: x for name, x in eps.items() if name in net.quantized}
  perturbed = F.cross_entropy(forward(net, images), labels)
  g = gradients(perturbed, net.params)
  with torch.no_grad():
    for name, x in g.items():
      d = x + DECAY * before[name]
      momenta[name] = MOMENTUM * momenta.get(name, 0.0) + d
      net.params[name].copy_(before[name] - LR * (d + MOMENTUM * momenta[name]))
  return clean.item(), perturbed.item(), norm.item()


def main():
  record = {}
  for case, forward in FORWARD.items():
    net, momenta, figures = Net(case), {}, []
    for t in range(nets.STEPS):
      images, labels = nets.batch(case, t)
      labels = torch.tensor(labels, dtype=torch.int64)
      figures.append(step(net, forward, momenta, torch.tensor(images), labels))
    changes = []
    for name, x in (net.params | net.stats).items():
      change = x.detach().numpy() - nets.first_value(case, name, x.shape)
      along = np.sum(change * nets.direction(case, name, change.shape))
      changes.append((np.linalg.norm(change), along))
    record[f'{case}/names'] = np.array(list(net.params | net.stats))
    record[f'{case}/changes'] = np.array(changes)
    for i, what in enumerate(('loss', 'loss_perturbed', 'grad_norm')):
      record[f'{case}/{what}'] = np.array([f[i] for f in figures])
    print(case, len(changes), *figures)
  np.savez_compressed(nets.RECORD, **record)


if __name__ == '__main__':
  main()
