"""Every option of moetrain: a typed schema, read from YAML, with dotted overrides.

Plain data only: no device, no process group, nothing of torch. base: what sections are made of. routers, model, sections: the options. rules:
what must hold between them. reading: files and command lines to configs and back.
"""

from moetrain.config.base import ConfigError, NonNegative, Positive, Section, short
from moetrain.config.model import (
    MAX_LAYERS,
    FinedeepConfig,
    LayerChoice,
    LayerRange,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    SharedConfig,
    StrataConfig,
)
from moetrain.config.reading import (
    config_from_dict,
    defaults,
    inner_sections,
    keys,
    load_config,
    parse_overrides,
    parse_yaml,
    read_yaml,
    schema,
    to_dict,
    to_yaml,
    validate,
)
from moetrain.config.routers import (
    ROUTERS,
    BaseLayersRouter,
    BudgetRouter,
    DynMoERouter,
    ExpertChoiceRouter,
    HashRouter,
    LanguageFamilyRouter,
    MoEppRouter,
    NexusRouter,
    ReMoERouter,
    Router,
    RouterOptions,
    SigmoidSteRouter,
    TaskRouter,
    TopKRouter,
    XMoERouter,
)
from moetrain.config.rules import check, check_world
from moetrain.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    EvalSource,
    ExportConfig,
    GenerateConfig,
    GuardConfig,
    LogConfig,
    ParallelConfig,
    PrepareConfig,
    ReportConfig,
    ScheduleConfig,
    Source,
    TrainConfig,
    UpcycleConfig,
    WatchdogConfig,
)
