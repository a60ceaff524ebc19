"""The models that recipes name, built for a data set's schema.

Each is a frozen dataclass with a ``name``; its ``build(schema)`` returns a train task. TorchRec's own are for clicks, the
others for every task. A user's own is named as ``package.module:function``.
"""

from typing import Any

from embsearch_plugin.models.fm import Fm
from embsearch_plugin.models.mf import Mf
from embsearch_plugin.models.mlp import Mlp
from embsearch_plugin.models.neumf import NeuMf
from embsearch_plugin.models.own import OwnModel
from embsearch_plugin.models.torchrec_own import DeepFm, Dlrm
from embsearch_plugin.models.wide_deep import WideDeep

ModelConfig = Dlrm | DeepFm | Mf | Mlp | NeuMf | Fm | WideDeep | OwnModel
CONFIGS: tuple[type[Any], ...] = (Dlrm, DeepFm, Mf, Mlp, NeuMf, Fm, WideDeep)
