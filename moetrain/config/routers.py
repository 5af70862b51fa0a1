"""The options of each router, and which routers there are.

A router is one section here, or in a file of the user's (docs/routers.md), and one module (moetrain.moe.routers). Defining a subclass of
`RouterOptions` with a `type` makes that type known to the schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import core_schema

from moetrain.config.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Seed

ROUTERS: dict[str, type[RouterOptions]] = {}
"""type -> section."""

_holders: list[type[Section]] = []


def holds_router(section: type[Section]) -> type[Section]:
    """Decorator of the sections that contain a router, from the innermost to the outermost: a router that is defined later changes them too."""
    _holders.append(section)
    return section


class RouterOptions(Section):
    """Base of the routers' options. What follows the options says about a router what the rest of the program needs to know."""

    type: str

    TRAINING: ClassVar[frozenset[str]] = frozenset({"init_std", "bias_init"})
    """Options that say how the model is trained and not what it computes: they may change when a run goes on."""
    ROW_PER_EXPERT: ClassVar[bool] = True
    """Every parameter has a row for each expert, so that virtual groups can repeat them."""
    NEVER_MORE: ClassVar[bool] = False
    """No token uses more experts than `default_active` says."""

    def problems(self, num_experts: int) -> list[str]:
        """What is wrong between the options, each beginning with `.option` or `:`; the caller writes the section's name before it."""
        return []

    def coefficients(self) -> dict[str, float]:
        """Loss that the router reports -> its coefficient (the start value, where a controller moves it)."""
        return {}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        """(parameters of the matrices that a token is multiplied with, other parameters)."""
        return num_experts * hidden_size, 0

    def default_active(self, num_experts: int) -> float:
        """Experts that a token uses as far as the options alone say: all, where it is learned."""
        return num_experts

    def probed_share(self) -> float:
        """Probability with which a (token, expert) pair is a probe at most, each for itself; 1: any number may be."""
        return 1.0

    def numbers_per_token_id(self) -> int:
        """Parameters kept for each token id of the vocabulary, of no matrix."""
        return 0

    def tag_names(self) -> list[str]:
        """Names of sources that the router tells apart: `TokenContext.tags` is a name's place in it, -1 for others; none: a source's number."""
        return []

    def caution(self) -> str | None:
        """What somebody who trains with these options is told once, at the start."""
        return None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        name = cls.model_fields["type"].default
        if isinstance(name, str):  # a base of several routers has no type of its own
            if name in ROUTERS and ROUTERS[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"router type {name} is taken by {ROUTERS[name].__name__}; give {cls.__name__} another")
            ROUTERS[name] = cls
            for holder in _holders:
                holder.model_rebuild(force=True)


class _AnyRouter:
    """The schema of a `router:` section: any of the known types, chosen by `type`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.tagged_union_schema({name: handler.generate_schema(cls) for name, cls in ROUTERS.items()}, discriminator="type")


if TYPE_CHECKING:
    Router = RouterOptions
else:
    Router = Annotated[RouterOptions, _AnyRouter()]


class BudgetOptions(RouterOptions):
    """Of routers with a sparsity loss: how many experts a token uses is learned, or held by a controller of the loss's coefficient."""

    sparsity_coef: NonNegativeFloat
    """Coefficient of the sparsity loss; the start value when `target_active` is set."""
    target_active: PositiveFloat | None = None
    """Mean routes per token to hold by adapting the sparsity coefficient; null keeps the coefficient."""
    target_over: Literal["model", "layer"] = "model"
    """`target_active` only: the mean over all layers is held, by one coefficient, or that of each layer, by one of its own."""
    controller_factor: Annotated[float, Field(gt=1)] = 1.05
    """`target_active` only. Largest factor by which the controller changes the coefficient in a step for the distance to the target; how the mean
    moves comes on top (ReMoE has 1.2)."""

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"sparsity_coef", "target_active", "target_over", "controller_factor"}

    def idle(self) -> set[str]:
        return set() if self.target_active is not None else {"controller_factor", "target_over"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        for name in sorted(BudgetOptions.idle(self) & self.model_fields_set):
            bad.append(f".{name} ({getattr(self, name)}) has an effect only with target_active")
        if self.target_active is not None:
            if self.target_active > num_experts:
                bad.append(f".target_active ({self.target_active}) is more than num_experts ({num_experts})")
            if self.sparsity_coef == 0:
                bad.append(".sparsity_coef: 0 can't be adapted to hold target_active; use a small positive start such as 1e-3")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"sparsity": self.sparsity_coef}


class SigmoidSteRouter(BudgetOptions):
    """DSMoE's router (arXiv 2502.12455): independent sigmoid gates, a threshold, a straight-through estimator, a sparsity loss."""

    type: Literal["sigmoid_ste"] = "sigmoid_ste"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """tau of Eq. 7: a gate routes when it is strictly above."""
    ste: Literal["exact", "sampled", "off"] = "exact"
    """Where the router's gradient comes from: every expert (Eqs. 10-11), a sample of the inactive ones, or the active ones alone."""
    probe_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """`ste: sampled` only: probability q that an inactive (token, expert) pair is probed, with importance 1/q."""
    zero_routes: Literal["skip", "top1"] = "skip"
    """A token whose gates are all closed: its FFN output is 0 (skip), or its largest gate routes all the same (top1)."""
    rescale: Literal["count", "none"] = "count"
    """Eq. 8: multiply by num_experts / number of routes of the token, or do not."""
    rescale_in_eval: bool = True
    """Whether Eq. 8 holds in evaluation too (the paper makes no difference)."""
    rescale_gradient: Literal["detached", "straight_through"] = "detached"
    """The count of Eq. 8 in backward: a constant (Eqs. 13-16), or straight-through like the gates."""
    sparsity_coef: NonNegativeFloat = 1.0
    """Eq. 19 has 1; the start value when `target_active` is set."""
    trim: bool = True
    """`target_active` only. The threshold, of all layers together or with `target_over: layer` of each, moves from `threshold` by what the mean
    takes to be the target, in training and, as it stands, at inference; the coefficient goes on holding the mean that there would be at
    `threshold` itself. false leaves the threshold where the paper has it, and may miss the target: a coefficient can't open gates."""
    sparsity_on: Literal["active", "all"] = "active"
    """Eq. 18 as printed pushes the gates above the threshold (active); `all` pushes every gate."""
    bias: bool = False
    """Router bias; the paper has none. It keeps its training without weight decay."""
    bias_init: float = 0.0
    """`bias: true` only. Start value; a large one (such as 4) opens every gate."""
    init_std: PositiveFloat = 0.02
    input: Literal["normed", "residual"] = "normed"
    """What the gates see: the FFN's input after the norm (the paper), or the residual stream before it."""

    TRAINING: ClassVar[frozenset[str]] = BudgetOptions.TRAINING | {"ste", "probe_rate", "sparsity_on", "rescale_gradient", "trim"}

    def probed_share(self) -> float:
        return self.probe_rate if self.ste == "sampled" else 1.0

    @property
    def moves_threshold(self) -> bool:
        return self.target_active is not None and self.trim

    def idle(self) -> set[str]:
        idle = super().idle()
        idle |= {"trim"} if self.target_active is None else set()
        idle |= set() if self.ste == "sampled" else {"probe_rate"}
        idle |= set() if self.bias else {"bias_init"}
        return idle | (set() if self.rescale == "count" else {"rescale_gradient", "rescale_in_eval"})

    def problems(self, num_experts: int) -> list[str]:
        bad, given = super().problems(num_experts), self.model_fields_set
        if "trim" in given and self.target_active is None:
            bad.append(f".trim ({str(self.trim).lower()}) has an effect only with target_active")
        if "probe_rate" in given and self.ste != "sampled":
            bad.append(f".probe_rate ({self.probe_rate}) has an effect only with ste: sampled, not {self.ste}")
        if "bias_init" in given and not self.bias:
            bad.append(f".bias_init ({self.bias_init}) has an effect only with bias: true")
        if self.rescale == "none" and ("rescale_gradient" in given or "rescale_in_eval" in given):
            bad.append(": rescale_gradient and rescale_in_eval have an effect only with rescale: count")
        return bad

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return num_experts * hidden_size, (num_experts if self.bias else 0) + self.moves_threshold


class BudgetRouter(RouterOptions):
    """Ours: a threshold on the probabilities that holds a mean number of experts per token exactly (docs/recipe.md)."""

    type: Literal["budget"] = "budget"
    target_active: PositiveFloat = 3.0
    """Mean routes per token, held in each sequence of training."""
    rank_by: Literal["probability", "logit"] = "probability"
    """What is compared between a sequence's (token, expert) pairs: the softmax over all experts, or the logits before it."""
    normalize: bool = True
    """Divide a token's weights by their sum, so that they add up to `output_scale`; false keeps the probabilities."""
    output_scale: PositiveFloat = 1.0
    """Every weight is multiplied by it. `moetrain upcycle` sets target_active for slices, num_experts with `normalize: false`."""
    cut_rate: Annotated[float, Field(gt=0, le=1)] = 0.02
    """How fast the cut that evaluation uses follows that of training; 1 / cut_rate steps."""
    balance_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss E * sum_e f_e P_e (Switch)."""
    z_coef: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss, mean of logsumexp(logits)^2 (ST-MoE)."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"cut_rate", "balance_coef", "z_coef"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        if self.target_active > num_experts:
            bad.append(f".target_active ({self.target_active}) is more than num_experts ({num_experts})")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef, "z": self.z_coef}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return num_experts * hidden_size, 2

    def default_active(self, num_experts: int) -> float:
        return self.target_active

    def caution(self) -> str | None:
        return (
            "budget is not causal in training: how many experts a token gets depends on the tokens after it in its sequence; evaluation and "
            "generation use the mean cut of past steps, which looks at no other token"
        )


class TopKRouter(RouterOptions):
    """The k experts of the largest scores route: Switch, GShard, LLaMA-MoE, Mixtral, DeepSeek-V3 (the recipes in configs/ set them up)."""

    type: Literal["topk"] = "topk"
    top_k: Positive
    score: Literal["softmax", "sigmoid"] = "softmax"
    """A token's score of an expert, from the gate's logits: softmax over all experts, or a sigmoid of each (DeepSeek-V3)."""
    gate: Literal["linear", "mlp", "cosine"] = "linear"
    """Logits of a token x: W x; V tanh(W x) (LLaMA-MoE); or cosines of x and the experts' rows over `cosine_temperature`."""
    cosine_temperature: PositiveFloat = 0.3
    """`gate: cosine` only."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training each component of the router's input is multiplied by a draw from [1 - jitter, 1 + jitter] (Switch: 0.01)."""
    noise: bool = False
    """In training logits get normal noise whose size the router learns (noisy top-k, LLaMA-MoE)."""
    second: Literal["always", "random"] = "always"
    """`top_k: 2` only: in training the second expert is used with probability min(1, 2 g2), g2 its share of the two scores (GShard: random)."""
    normalize: bool = True
    """Divide the k weights by their sum (for softmax the same as a softmax over the k logits); false keeps the scores. With one expert per
    token it must be false for the router to learn from the model's loss (Switch)."""
    output_scale: PositiveFloat = 1.0
    """Every weight is multiplied by it; LLaMA-MoE uses num_experts / top_k, DeepSeek-V3 2.5."""
    selection_bias: bool = False
    """`score: sigmoid` only: what chooses is score + bias; after each step a bias rises where the load was below the mean and falls where it
    was above (DeepSeek-V3)."""
    bias_rate: NonNegativeFloat = 1e-3
    """`selection_bias` only: the change of a bias in a step (gamma)."""
    num_groups: Positive = 1
    """`score: sigmoid` only: experts lie in so many equal groups (DeepSeek-V3's nodes), of which a token uses `top_groups` at most."""
    top_groups: Positive = 1
    """`num_groups` above 1 only: the groups with the largest sums of their top_k / top_groups best scores."""
    balance_coef: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss E * sum_e f_e P_e (Switch), f the share of the routes, P the mean share of the scores."""
    balance_over: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """The tokens that f counts: of the micro-batch on all ranks, of each sequence, or of all micro-batches of the step so far on all ranks."""
    balance_count: Literal["all", "first"] = "all"
    """f counts all k choices of a token, or the first alone (GShard). Choices count whether or not they are dropped."""
    cv_coef: NonNegativeFloat = 0.0
    """Coefficient of CV^2(importance) + CV^2(load) over the micro-batch on all ranks (LLaMA-MoE: 0.01)."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most ceil(capacity_factor * top_k * tokens / num_experts) routes of each sequence, the others are dropped;
    null drops none."""
    drop: Literal["position", "probability", "random"] = "position"
    """`capacity_factor` only. What a full expert keeps: first choices before second ones, each by position; the largest scores; or random
    routes (Z-code's random token selection)."""
    z_coef: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss, mean of logsumexp(logits)^2 (ST-MoE)."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {
        "balance_coef", "z_coef", "jitter", "second", "bias_rate", "balance_over", "balance_count", "cv_coef", "capacity_factor", "drop",
    }  # fmt: skip
    NEVER_MORE: ClassVar[bool] = True

    def idle(self) -> set[str]:
        idle = set() if self.gate == "cosine" else {"cosine_temperature"}
        idle |= set() if self.selection_bias else {"bias_rate"}
        idle |= set() if self.num_groups > 1 else {"top_groups"}
        return idle | (set() if self.capacity_factor is not None else {"drop"})

    def problems(self, num_experts: int) -> list[str]:
        bad, given, groups = [], self.model_fields_set, self.num_groups
        if self.top_k > num_experts:
            bad.append(f".top_k ({self.top_k}) is more than num_experts ({num_experts})")
        if "cosine_temperature" in given and self.gate != "cosine":
            bad.append(f".cosine_temperature ({self.cosine_temperature}) has an effect only with gate: cosine, not {self.gate}")
        if self.noise and self.score != "softmax":
            bad.append(f".noise: noisy top-k is for score: softmax, not {self.score}")
        if self.second == "random" and self.top_k != 2:
            bad.append(f".second: random needs top_k: 2, not {self.top_k}")
        if self.selection_bias and self.score != "sigmoid":
            bad.append(f".selection_bias needs score: sigmoid, not {self.score}")
        if "bias_rate" in given and not self.selection_bias:
            bad.append(f".bias_rate ({self.bias_rate}) has an effect only with selection_bias: true")
        if groups > 1 and self.score != "sigmoid":
            bad.append(f".num_groups ({groups}) needs score: sigmoid, not {self.score}")
        elif num_experts % groups:
            bad.append(f".num_groups ({groups}) must divide num_experts ({num_experts})")
        if "top_groups" in given and groups == 1:
            bad.append(f".top_groups ({self.top_groups}) has an effect only with num_groups above 1")
        elif self.top_groups > groups:
            bad.append(f".top_groups ({self.top_groups}) is more than num_groups ({groups})")
        elif self.top_k <= num_experts and self.top_groups * (num_experts // groups) < self.top_k:
            reach = self.top_groups * (num_experts // groups)
            bad.append(f".top_groups ({self.top_groups}) groups have {reach} experts, fewer than top_k ({self.top_k})")
        if "drop" in given and self.capacity_factor is None:
            bad.append(f".drop ({self.drop}) has an effect only with capacity_factor")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef, "z": self.z_coef} | ({"cv": self.cv_coef} if self.cv_coef else {})

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        # The noise is for training alone: parameters, but no work of a forward pass.
        matrices = num_experts * hidden_size + num_experts**2 * (self.gate == "mlp")
        return matrices, num_experts * (self.selection_bias + hidden_size * self.noise)

    def default_active(self, num_experts: int) -> float:
        return self.top_k


class ReMoERouter(BudgetOptions):
    """ReMoE (arXiv 2412.14711): ReLU gates, held at a budget by an L1 loss with an adaptive coefficient."""

    type: Literal["remoe"] = "remoe"
    sparsity_coef: NonNegativeFloat = 1e-8
    """Start value lambda_0, so small that training begins dense; with `target_active: null` it stays and so wants to be larger."""
    controller_factor: Annotated[float, Field(gt=1)] = 1.2
    """As in sigmoid_ste: alpha."""
    load_weighted: bool = True
    """An expert's gates are pushed in proportion to its load (L_reg,lb), which balances the experts too; false is the plain L1."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = BudgetOptions.TRAINING | {"load_weighted"}


class XMoERouter(RouterOptions):
    """XMoE (arXiv 2403.18926): a token takes its likeliest experts until their probabilities add up to a threshold."""

    type: Literal["xmoe"] = "xmoe"
    threshold: Fraction = 0.9
    """t: 0 is the first choice alone, 1 is all experts. The start value when `target_active` is set."""
    target_active: Annotated[float, Field(ge=1)] | None = None
    """Mean routes per token that each layer holds by moving a threshold of its own; null keeps `threshold`."""
    max_experts: Positive | None = None
    """A token takes this many experts at most; null: no limit."""
    normalize: bool = False
    """Divide a token's weights by their sum; the authors' code keeps the probabilities."""
    balance_coef: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss E * sum_e f_e P_e, f the share of the first choices, P the mean probability."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most ceil(capacity_factor * tokens / num_experts) routes of each sequence: first choices before second
    ones, each by probability; null drops none."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"balance_coef", "capacity_factor"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        most = num_experts if self.max_experts is None else self.max_experts
        if most > num_experts:
            bad.append(f".max_experts ({self.max_experts}) is more than num_experts ({num_experts})")
        elif self.target_active is not None and self.target_active > most:
            bad.append(f".target_active ({self.target_active}) is more than the {most} experts that a token can take")
        if self.target_active is not None and not 0 < self.threshold < 1:
            bad.append(f".threshold ({self.threshold}) can't be moved to hold target_active; start strictly between 0 and 1")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return num_experts * hidden_size, int(self.target_active is not None)

    def default_active(self, num_experts: int) -> float:
        return self.target_active or self.max_experts or num_experts


class DynMoERouter(RouterOptions):
    """DynMoE (arXiv 2405.14297): cosine scores above learned thresholds route; experts come and go while the model trains."""

    type: Literal["dynmoe"] = "dynmoe"
    adapt_every: Positive | None = None
    """Every so many optimizer steps experts that nobody used are removed and, if a token used none, one is added; null: they stay."""
    record_steps: Positive | None = None
    """`adapt_every` only: the last steps of each period in which use is recorded; null: half of them, as in the authors' example."""
    start_experts: Positive | None = None
    """`adapt_every` only: experts at the start; the rest of `num_experts` are free slots. null: all."""
    balance_coef: NonNegativeFloat = 0.01
    """Coefficient of E * sum_e P_e f_e over the tokens that have a route: P the mean weight, f the share of the tokens that use e (the authors'
    code; it multiplies the sum of its four losses by one coefficient)."""
    efficiency_coef: NonNegativeFloat = 0.01
    """Coefficient of the mean share of the slots that a token uses (the authors' code)."""
    orthogonality_coef: NonNegativeFloat = 0.01
    """Coefficient of the Frobenius norm of the experts' cosines less the unit matrix (the paper's diversity loss)."""
    norm_coef: NonNegativeFloat = 0.01
    """Coefficient of the mean norm of the experts' rows (the paper's simplicity loss)."""

    TRAINING: ClassVar[frozenset[str]] = frozenset({"balance_coef", "efficiency_coef", "orthogonality_coef", "norm_coef", "record_steps"})

    def idle(self) -> set[str]:
        return set() if self.adapt_every is not None else {"record_steps", "start_experts"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        for name in sorted(self.idle() & self.model_fields_set):
            if getattr(self, name) is not None:
                bad.append(f".{name} ({getattr(self, name)}) has an effect only with adapt_every")
        if self.adapt_every is not None and self.recorded_steps > self.adapt_every:
            bad.append(f".record_steps ({self.record_steps}) is more than adapt_every ({self.adapt_every})")
        if self.start_experts is not None and self.start_experts > num_experts:
            bad.append(f".start_experts ({self.start_experts}) is more than num_experts ({num_experts})")
        return bad

    @property
    def recorded_steps(self) -> int:
        return self.record_steps or ((self.adapt_every or 0) + 1) // 2

    def coefficients(self) -> dict[str, float]:
        return {
            "balance": self.balance_coef, "efficiency": self.efficiency_coef, "orthogonality": self.orthogonality_coef, "norm": self.norm_coef,
        }  # fmt: skip

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        state = 0 if self.adapt_every is None else 2 * num_experts + hidden_size + 1
        return num_experts * hidden_size, num_experts + state


class MoEppRouter(RouterOptions):
    """MoE++ (arXiv 2410.07348): beside the FFN experts there are zero, copy and constant experts, which cost next to nothing."""

    type: Literal["moepp"] = "moepp"
    top_k: Positive = 2
    """Experts of either kind that a token chooses."""
    num_zero: NonNegative = 1
    """Experts whose output is 0."""
    num_copy: NonNegative = 1
    """Experts whose output is their input."""
    num_constant: NonNegative = 2
    """Experts that mix their input with a learned vector."""
    gating_residual: bool = True
    """A layer's logits get those of the MoE layer before, through a learned matrix (pathway-aware router)."""
    normalize: bool = False
    """Divide a token's weights by the sum of those of other experts than zero experts (the authors' code; the paper keeps the softmax)."""
    tau: PositiveFloat = 0.75
    """Share of the work of an FFN expert that the balance loss and the capacity mean for it, against 1 of a zero-cost expert; smaller sends more
    tokens to those."""
    balance_coef: NonNegativeFloat = 0.01
    """beta: coefficient of sum_i eta_i f_i P_i."""
    capacity_factor: PositiveFloat | None = 1.1
    """gamma: in training an expert takes at most so many times its share of a sequence's choices; null drops none."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"tau", "balance_coef", "capacity_factor"}

    @property
    def num_light(self) -> int:
        return self.num_zero + self.num_copy + self.num_constant

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        if not self.num_light:
            bad.append(": num_zero, num_copy and num_constant are 0; without such experts use type: topk")
        if self.top_k > num_experts + self.num_light:
            bad.append(f".top_k ({self.top_k}) is more than the {num_experts} FFN experts and the {self.num_light} others")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        total = num_experts + self.num_light
        return total * (hidden_size + total * self.gating_residual) + 3 * self.num_constant * hidden_size, 0

    def default_active(self, num_experts: int) -> float:
        # The share that balance aims at.
        return min(num_experts, self.top_k * self.tau * num_experts / (self.tau * num_experts + self.num_light))


class ExpertChoiceRouter(RouterOptions):
    """Each expert takes the tokens of its largest scores (Expert Choice, arXiv 2202.09368), or all above a running estimate of that cut (Expert
    Threshold, arXiv 2603.11535)."""

    type: Literal["expert_choice"] = "expert_choice"
    capacity_factor: PositiveFloat = 2.0
    """c: an expert takes ceil(c * tokens / num_experts) tokens, so that a token has c experts in the mean."""
    over: Literal["sequence", "micro_batch"] = "sequence"
    """The tokens that an expert chooses among in training: each sequence by itself, or the micro-batch of all ranks."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Of the logits: softmax over the experts (Expert Choice), or a sigmoid of each. It is also the weight."""
    training: Literal["choice", "threshold"] = "choice"
    """Training routes by the experts' choice, which sees later tokens, or after `warmup_steps` by the estimated cut, which does not."""
    warmup_steps: NonNegative = 100
    """`training: threshold` only: steps that route by choice while the cut is first estimated."""
    evaluation: Literal["threshold", "choice"] = "threshold"
    """What held-out loss is measured with: the cut, as generation and exported models have it, or the choice within each sequence (the paper),
    which sees later tokens and so makes the loss too good."""
    cut_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """The estimate moves by this share of its distance from the step's own cut; while there were fewer than 1 / cut_rate steps it is their
    mean."""
    init_std: PositiveFloat = 0.02

    ROW_PER_EXPERT: ClassVar[bool] = False
    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"capacity_factor", "over", "training", "warmup_steps", "evaluation", "cut_rate"}

    def idle(self) -> set[str]:
        return set() if self.training == "threshold" else {"warmup_steps"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        if self.capacity_factor > num_experts:
            bad.append(f".capacity_factor ({self.capacity_factor}) is more than num_experts ({num_experts}): no token has so many experts")
        if "warmup_steps" in self.model_fields_set and self.training != "threshold":
            bad.append(f".warmup_steps ({self.warmup_steps}) has an effect only with training: threshold, not {self.training}")
        return bad

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return num_experts * hidden_size, num_experts + 1

    def default_active(self, num_experts: int) -> float:
        return min(self.capacity_factor, num_experts)

    def caution(self) -> str | None:
        if self.training == "threshold":
            return None
        return (
            "expert_choice is not causal in training: whether a token is chosen depends on the tokens after it, so its training loss is lower "
            "than a causal model's; evaluation: threshold measures without that, training: threshold trains without it"
        )


class BaseLayersRouter(RouterOptions):
    """BASE layers (arXiv 2103.16716): in training the tokens of a sequence are shared out equally, at the largest sum of scores."""

    type: Literal["base_layers"] = "base_layers"
    init_std: PositiveFloat = 0.02

    NEVER_MORE: ClassVar[bool] = True

    def default_active(self, num_experts: int) -> float:
        return 1

    def caution(self) -> str | None:
        return (
            "base_layers is not causal in training: a token's expert depends on the tokens after it in its sequence; evaluation and generation "
            "take each token's best expert, which does not"
        )


class LanguageFamilyRouter(RouterOptions):
    """Hybrid routing of Post-MoE (Apollo-MoE, arXiv 2410.10626): softmax top-k, which in training must hold the expert of the sample's language."""

    type: Literal["language_family"] = "language_family"
    top_k: Positive = 2
    languages: dict[str, NonNegative]
    """Source in `data.train` -> the expert of its language or family of languages. A source that is not named has none."""
    balance_coef: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss E * sum_e f_e P_e over the micro-batch on all ranks; the paper has none."""
    init_std: PositiveFloat = 0.02

    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"balance_coef"}
    NEVER_MORE: ClassVar[bool] = True

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        if self.top_k > num_experts:
            bad.append(f".top_k ({self.top_k}) is more than num_experts ({num_experts})")
        if not self.languages:
            bad.append(".languages names no source; without one use type: topk")
        for name, expert in self.languages.items():
            if expert >= num_experts:
                bad.append(f".languages: the expert of {name} ({expert}) must be below num_experts ({num_experts})")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef}

    def default_active(self, num_experts: int) -> float:
        return self.top_k

    def tag_names(self) -> list[str]:
        return sorted(self.languages)


class NexusRouter(RouterOptions):
    """Nexus (arXiv 2408.15901): an expert's row of the router is a learned projection of its domain's embedding, which is given and fixed."""

    type: Literal["nexus"] = "nexus"
    embeddings: Annotated[str | None, Field(min_length=1)] = None
    """A safetensors file with one tensor (num_experts, domain_dim): the embedding of each expert's domain, such as the mean over its data. It is
    read for start weights that are drawn (also by upcycling); from then on the model has it."""
    domain_dim: Positive
    """m, the size of a domain's embedding."""
    projection_dim: Positive | None = None
    """h, the inner size of the projection; null: hidden_size."""
    top_k: Positive = 1
    balance_coef: NonNegativeFloat = 0.05
    """Coefficient of the load-balancing loss E * sum_e f_e P_e over the micro-batch on all ranks (the paper's factor)."""
    init_std: PositiveFloat = 0.1
    """Of the projection's matrices. Logits are a product of three of them: the usual 0.02 would leave them near 0."""

    ROW_PER_EXPERT: ClassVar[bool] = False
    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"embeddings", "balance_coef"}
    NEVER_MORE: ClassVar[bool] = True

    def problems(self, num_experts: int) -> list[str]:
        return [f".top_k ({self.top_k}) is more than num_experts ({num_experts})"] if self.top_k > num_experts else []

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        # A token is multiplied with the projected embeddings (num_experts, hidden_size), which are no parameters; the projection itself is
        # computed once for all tokens. So the first number is that of a token's work, and the second makes the sum right.
        inner, work = self.projection_dim or hidden_size, num_experts * hidden_size
        return work, 2 * inner * self.domain_dim + hidden_size * inner + num_experts * self.domain_dim - work

    def default_active(self, num_experts: int) -> float:
        return self.top_k


class HashRouter(RouterOptions):
    """Hash layers (arXiv 2106.04426): a token's experts follow from its id, by a table that never changes."""

    type: Literal["hash"] = "hash"
    num_hashes: Positive = 1
    """k, experts of each token id; each has weight 1 / k."""
    frequencies: Annotated[str | None, Field(min_length=1)] = None
    """A JSON file with a list of how often each token id occurs (`moetrain prepare` writes PREFIX.counts.json with prepare.counts: true). Ids
    are shared out so that every expert has about equally many tokens; null: at random. It is read for start weights that are drawn; from then
    on the model has the table."""
    seed: Seed = 0
    """Of the random table, and of the order of equally frequent ids. Every layer has a table of its own."""

    ROW_PER_EXPERT: ClassVar[bool] = False
    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"frequencies", "seed"}
    NEVER_MORE: ClassVar[bool] = True

    def problems(self, num_experts: int) -> list[str]:
        return [f".num_hashes ({self.num_hashes}) is more than num_experts ({num_experts})"] if self.num_hashes > num_experts else []

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return 0, 0

    def numbers_per_token_id(self) -> int:
        return self.num_hashes

    def default_active(self, num_experts: int) -> float:
        return self.num_hashes


class TaskRouter(RouterOptions):
    """Experts by the sample's task, that is its source: a gate learned per task (Task-level MoE, arXiv 2110.03742), or fixed branches (Lego-MT)."""

    type: Literal["task"] = "task"
    tasks: list[str] = []
    """Sources in `data.train`, each of which has logits of its own that choose its `top_k` experts in every layer."""
    branches: dict[str, list[NonNegative]] = {}
    """Instead of `tasks`: source in `data.train` -> its experts, in every layer, equally weighted. Nothing is learned."""
    top_k: Positive = 2
    """`tasks` only."""
    normalize: bool = True
    """`tasks` only: divide the k weights by their sum; false keeps the softmax's values, as top_k: 1 needs to learn from the model's loss."""
    balance_coef: NonNegativeFloat = 0.01
    """`tasks` only: coefficient of the load-balancing loss E * sum_e f_e P_e over the micro-batch on all ranks."""
    init_std: PositiveFloat = 0.02
    """`tasks` only."""

    ROW_PER_EXPERT: ClassVar[bool] = False
    TRAINING: ClassVar[frozenset[str]] = RouterOptions.TRAINING | {"balance_coef"}

    def idle(self) -> set[str]:
        return {"top_k", "normalize", "balance_coef", "init_std", "tasks"} if self.branches else {"branches"}

    def problems(self, num_experts: int) -> list[str]:
        bad = []
        if bool(self.tasks) == bool(self.branches):
            return [": give either tasks, whose experts are learned, or branches, whose experts are named"]
        for name in sorted(self.idle() & self.model_fields_set):
            if self.branches and name != "tasks":
                bad.append(f".{name} ({getattr(self, name)}) has an effect only with tasks, not with branches")
        if self.tasks and self.top_k > num_experts:
            bad.append(f".top_k ({self.top_k}) is more than num_experts ({num_experts})")
        if len(set(self.tasks)) < len(self.tasks):
            bad.append(f".tasks: a name is given twice in {', '.join(self.tasks)}")
        for name, experts in self.branches.items():
            if not experts or len(set(experts)) < len(experts) or max(experts) >= num_experts:
                bad.append(f".branches: {name} must have one or more different experts below num_experts ({num_experts}), found {experts}")
        return bad

    def coefficients(self) -> dict[str, float]:
        return {"balance": self.balance_coef} if self.tasks else {}

    def num_params(self, num_experts: int, hidden_size: int) -> tuple[int, int]:
        return 0, num_experts * len(self.tasks)

    def default_active(self, num_experts: int) -> float:
        return self.top_k if self.tasks else sum(map(len, self.branches.values())) / len(self.branches)

    def tag_names(self) -> list[str]:
        return self.tasks or sorted(self.branches)
