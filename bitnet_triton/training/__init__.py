"""Above the models: parts for trainers, tasks that need a far context, and evaluation."""

from bitnet_triton.training.calibration import calibrate
from bitnet_triton.training.checkpoints import SafeCheckpoints, last_checkpoint
from bitnet_triton.training.evaluation import evaluate
from bitnet_triton.training.jobs import Calibration
from bitnet_triton.training.longrope import LongRopeJob, search_longrope
from bitnet_triton.training.loss_trainer import LossTrainer
from bitnet_triton.training.monitor import TernaryMonitor
from bitnet_triton.training.packing import PackingCollator, pack_rows
from bitnet_triton.training.recipe import TwoStages
from bitnet_triton.training.relations import logits_loss, relation_loss
from bitnet_triton.training.results import Report
from bitnet_triton.training.settings import Setting, combine, parse_setting

__all__ = [
    "Calibration",
    "LongRopeJob",
    "LossTrainer",
    "PackingCollator",
    "Report",
    "SafeCheckpoints",
    "Setting",
    "TernaryMonitor",
    "TwoStages",
    "calibrate",
    "combine",
    "evaluate",
    "last_checkpoint",
    "logits_loss",
    "pack_rows",
    "parse_setting",
    "relation_loss",
    "search_longrope",
]
