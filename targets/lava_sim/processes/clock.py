"""The clock of a process that knows which sample, phase and tick the network is at: the host gives one command for a run of many samples."""

from __future__ import annotations

from typing import Any

from toolchain.targets.lava_sim.pace import OwnPace
from toolchain.targets.lava_sim.plan import PHASES, Board

FORWARD, FEEDBACK = (PHASES.index(name) for name in ("forward", "feedback"))


class ClockedModel(OwnPace):
    """Counts its own ticks on line `line` of the board, and changes sample and phase by itself; `lengths` are the ticks of each phase of `PHASES`."""

    def __init__(self, proc_params: Any, board: Board, line: int, lengths: tuple[int, ...]) -> None:
        super().__init__(proc_params)
        self.board, self.line, self.lengths = board, line, lengths
        self.tick = 0
        self.run_number = 0
        self.slot = 0
        self.batch = 0
        self.phase_index = FORWARD

    def run_spk(self) -> None:
        if self.tick == 0:
            self._next_sample()
            self._begin_sample()
        self._advance()
        self.board.ticks[self.line] += 1
        self.tick += 1
        if self.tick == self.lengths[self.phase_index]:
            self._end_sample()
            self.tick = 0

    def _next_sample(self) -> None:
        """Where the network stands: a run's first batch, or the batch after the last."""
        self.phase_index, first, run = self.board.read()
        self.slot = 0 if run != self.run_number else self.slot + 1
        self.run_number = run
        self.batch = first + self.slot

    def _begin_sample(self) -> None:
        pass

    def _advance(self) -> None:
        raise NotImplementedError

    def _end_sample(self) -> None:
        pass
