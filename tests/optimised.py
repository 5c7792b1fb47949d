"""Compilation as users have it, for laws that hold of bits and not of numbers.

The other tests run with little of XLA's optimisation (conftest.py), which takes half the time. What
it may change are last bits: a product and a sum that become one operation round once.
"""

import functools

import jax

OPTIONS = {
  'xla_backend_optimization_level': 3,
  'xla_llvm_disable_expensive_passes': False,
  'xla_cpu_use_fusion_emitters': True,
}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)
