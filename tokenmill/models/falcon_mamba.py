"""Falcon Mamba: Mamba with a norm of steps and coefficients."""

from __future__ import annotations

from tokenmill.layers.norm import unweighted_norm
from tokenmill.layers.scope import Scope
from tokenmill.models import mamba
from tokenmill.models.llama import Apply
from tokenmill.program.value import Value


class Config(mamba.Config, kw_only=True):
    """The fields of config.json that this file reads, with the defaults of transformers' FalconMambaConfig."""

    mixer_rms_eps: float = 1e-6


class Mixer(mamba.Mixer):
    """Mamba's mixer, with norms without weights."""

    def __init__(self, c: mamba.Sizes, scope: Scope, layer: int) -> None:
        super().__init__(c, scope, layer)
        assert isinstance(c, Config)
        self.eps = c.mixer_rms_eps

    def norm(self, dt: Value, b: Value, c: Value) -> tuple[Value, Value, Value]:
        """Normalize step, b and c."""
        dt, b, c = (unweighted_norm(v, self.eps) for v in (dt, b, c))
        return dt, b, c


class Layer(mamba.Layer):
    """Mamba's layer, with this file's mixer."""

    def mixer(self, c: mamba.Sizes, scope: Scope, layer: int) -> Apply:
        """Return the mixer."""
        return Mixer(c, scope, layer)


class Model(mamba.Model):
    """Mamba's model, with this file's layers."""

    layer = Layer
