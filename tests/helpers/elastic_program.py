"""cm_train whose rank 1 kills itself at the fourth step, unless torchrun has started it anew."""

import os
import signal
import sys

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig
from cm.runtime.job import run_main
from cm.training.trainer import Trainer

step = Trainer.run_step


def run_step(self, *batch):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and self.state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)


if __name__ == "__main__":
    Trainer.run_step = run_step
    run_main(lambda: run_train(parse(CmTrainConfig, sys.argv[1:])))
