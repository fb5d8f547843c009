"""Parameters, memory, FLOPs and communication of a training step, computed from a config before anything is trained."""

from onerec_hf.planning.activations import Batch
from onerec_hf.planning.hardware import GPUS, Gpu
from onerec_hf.planning.layouts import STRATEGIES, Layout, layouts
from onerec_hf.planning.parameters import active_parameters, count_parameters
from onerec_hf.planning.plan import HEADER, Plan, best, make_plan, make_plans, summary, table

__all__ = [
    "GPUS",
    "HEADER",
    "STRATEGIES",
    "Batch",
    "Gpu",
    "Layout",
    "Plan",
    "active_parameters",
    "best",
    "count_parameters",
    "layouts",
    "make_plan",
    "make_plans",
    "summary",
    "table",
]
