"""Every knob of the framework, and how one run's configuration is put together.

knobs.py     what a knob is: a dataclass field that owns its default, type, range and meaning
model.py     ModelConfig and the presets
recipes.py   the other sections, and one schema a recipe
load.py      dataclass < preset < parents < file < command line
"""

from moe.config.knobs import Section, UserError, knob, nearest, value_at
from moe.config.load import describe, differences, fingerprint, load, resolve, to_dict
from moe.config.model import PRESETS, ModelConfig, check_rope_scaling, check_routing
from moe.config.recipes import (
    DataConfig,
    FinetuneConfig,
    GenerateConfig,
    GenerateRecipe,
    GrpoConfig,
    GrpoRecipe,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    SftConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS", "DataConfig", "FinetuneConfig", "GenerateConfig", "GenerateRecipe", "GrpoConfig", "GrpoRecipe",
    "LogConfig", "ModelConfig", "OptimConfig",
    "ParallelConfig", "PretrainConfig", "RunConfig", "Section", "SftConfig", "TaskConfig", "TrainConfig", "UserError",
    "check_rope_scaling", "check_routing", "describe", "differences", "fingerprint", "knob", "load", "nearest",
    "resolve", "to_dict", "value_at",
]  # fmt: skip
