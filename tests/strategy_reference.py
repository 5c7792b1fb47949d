"""The strategies in NumPy float64: whole runs of gradient descent, written out step by step."""

import numpy as np
from transform_reference import NO_SCALES, RHO, closed_form, quadratic, start

LR = 0.001


def norm(v):
  return np.sqrt(np.sum(v**2))


class Run:
  """Gradient descent on a quadratic loss; each method is one step of a strategy.

  `v` are the latent weights, and `taken` says of each step whether it took a second gradient.
  """

  def __init__(self, quantizer, case, *, eta=None, accumulate=False):
    self.quantizer, self.how = quantizer, {'case': case, 'eta': eta, 'accumulate': accumulate}
    self.v, self.memory, self.taken = start(quantizer), None, []

  @property
  def g(self):
    return quadratic(self.quantizer.forward(self.v))

  def full(self, gradient=quadratic):
    found = closed_form(
      self.quantizer,
      self.v,
      rho=RHO,
      mask=NO_SCALES,
      gradient=gradient,
      second=quadratic,
      **self.how,
    )
    return found

  def step(self, update, taken):
    self.v = self.v - LR * update
    self.taken.append(taken)

  def sometimes(self, taken):
    self.step(self.full()['out'] if taken else self.quantizer.pullback(self.v, self.g), taken)

  def adaptive(self, t, total, first, last, decay):
    square = norm(self.g) ** 2
    if t == 0:
      mean, var = square, 0.0
    else:
      mean, var = self.memory
      mean = decay * mean + (1 - decay) * square
      var = decay * var + (1 - decay) * (square - mean) ** 2
    self.memory = mean, var
    self.sometimes(square >= mean + (first + (last - first) * t / total) * np.sqrt(var))

  def looksam(self, t, k, alpha):
    g = self.g
    if t % k == 0:
      found = self.full()
      g2 = found['g2']
      self.memory = g2 - (g @ g2) / norm(g) ** 2 * g
      self.step(found['out'], True)
    else:
      u = g + alpha * norm(g) / norm(self.memory) * self.memory
      self.step(self.quantizer.pullback(self.v, u), False)

  def momentum(self, decay):
    m = np.zeros_like(self.v) if self.memory is None else self.memory
    if not m.any():  # no direction, no perturbation
      g = self.g
      update = self.quantizer.pullback(self.v, g)
    else:
      found = self.full(gradient=lambda _: m)
      g, update = found['g2'], found['out']
    self.memory = decay * m + (1 - decay) * g
    self.step(update, False)
