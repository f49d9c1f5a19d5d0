"""A training run that a fault hits on one rank: FAULT=kind:rank:step RUN=folder DATA=file, then this module."""

import os
import signal
import sys
import time

from cm.commands.cli import parse
from cm.config.scripts import CmTrainConfig
from cm.runtime import distributed, job
from tests.helpers.models import TINY_FLAGS

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 2 --save_interval 100 "
    "--preview_count 0 --ema_rate 0.9 --lr 1e-3 --total_training_steps 6 --training_mode consistency_training "
    "--loss_norm l2 --weight_schedule uniform --start_ema 0.5 --start_scales 4 --device cpu"
)


def deliberate() -> None:
    raise ArithmeticError("deliberate")


def stuck_for_ever() -> None:
    time.sleep(100)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda: os._exit(0),
    "raise": deliberate,
    "exit": lambda: sys.exit(7),
    "stuck": stuck_for_ever,
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "slow": lambda: time.sleep(0.3),
    "none": lambda: None,
}


def main() -> None:
    from cm.commands.train import run_train
    from cm.training.trainer import Trainer

    kind, rank, step = os.environ.get("FAULT", "none:0:0").split(":")
    run_step = Trainer.run_step

    def faulty(self, *args):
        hit = distributed.get_rank() == int(rank) and self.state.step == int(step)
        if hit:
            time.sleep(0.5)  # the heartbeat notes the step
        if hit or kind == "slow":
            FAULTS[kind]()
        return run_step(self, *args)

    Trainer.run_step = faulty
    more = os.environ.get("FLAGS", "").split()
    places = ["--data_dir", os.environ["DATA"], "--out_dir", os.environ["RUN"]]
    run_train(parse(CmTrainConfig, [*FLAGS.split(), *more, *places]))


if __name__ == "__main__":
    job.run_main(main)
