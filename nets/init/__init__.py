"""How layers start: factors that keep signals at their size, or are near a weight, or near what a layer computes."""

from .decomposition import Decomposition, decompose
from .fixed_rank_search import FixedRankSearch, fixed_rank_search
from .function_error import MonteCarloError, function_error, monte_carlo_error, relu_error
from .low_rank import BiasedLowRankFactors, LowRankFactors, lowrank_factors, lowrank_factors_with_bias
from .reproducing import dummy_tensor, reproducing_transformation
from .residual import scale_residual_branches_
from .tensor import tensor_kaiming_, tensor_xavier_
from .variance import core_variances, tensor_fans
from .variance_report import VarianceReport, variance_report

__all__ = [
    "BiasedLowRankFactors",
    "Decomposition",
    "FixedRankSearch",
    "LowRankFactors",
    "MonteCarloError",
    "VarianceReport",
    "core_variances",
    "decompose",
    "dummy_tensor",
    "fixed_rank_search",
    "function_error",
    "lowrank_factors",
    "lowrank_factors_with_bias",
    "monte_carlo_error",
    "relu_error",
    "reproducing_transformation",
    "scale_residual_branches_",
    "tensor_fans",
    "tensor_kaiming_",
    "tensor_xavier_",
    "variance_report",
]
