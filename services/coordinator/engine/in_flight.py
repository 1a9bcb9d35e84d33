"""The steps that are on their way: what each was, which of its sessions are not back, and when it counts as lost; pure.

Time is given, never read.
"""

from __future__ import annotations

from services.coordinator.engine.sequence import InFlightStep, PlanLimits

# A step that takes this many times its prediction, and never less than the floor, counts as lost.
DEADLINE_FACTOR = 20.0
DEADLINE_FLOOR_SECONDS = 8.0


class InFlightSteps:
    """All steps in flight, by their number."""

    def __init__(self) -> None:
        self._by_step_id: dict[int, InFlightStep] = {}

    def __len__(self) -> int:
        return len(self._by_step_id)

    @property
    def decode_steps(self) -> int:
        """How many of them have the newest token of some session."""
        return sum(flight.decodes for flight in self._by_step_id.values())

    def add(self, flight: InFlightStep) -> None:
        """A step that goes now."""
        self._by_step_id[flight.step.step_id] = flight

    def get(self, step_id: int) -> InFlightStep | None:
        """A step that is not wholly back."""
        return self._by_step_id.get(step_id)

    def close(self, flight: InFlightStep) -> None:
        """Forget a step once all of its sessions are back."""
        if not flight.sessions:
            self._by_step_id.pop(flight.step.step_id, None)

    def clear(self) -> None:
        """Forget all: whatever comes back is of an older epoch."""
        self._by_step_id.clear()

    def forget_session(self, session_id: str) -> None:
        """Wait no longer for what is on its way of a session."""
        for flight in list(self._by_step_id.values()):
            flight.sessions.pop(session_id, None)
            self.close(flight)

    def to_send_again(self, now: float) -> list[InFlightStep]:
        """All of them in their order, with their time begun anew."""
        flights = [self._by_step_id[step_id] for step_id in sorted(self._by_step_id)]
        for flight in flights:
            flight.deadline += now - flight.sent_at
            flight.sent_at = now
        return flights

    def take_overdue(self, now: float) -> list[InFlightStep]:
        """Forget and return those whose time is over."""
        overdue = [flight for flight in self._by_step_id.values() if flight.deadline <= now]
        for flight in overdue:
            del self._by_step_id[flight.step.step_id]
        return overdue

    def deadline_seconds(self, tokens: int, limits: PlanLimits) -> float:
        """How long a step of so many tokens that goes now may take, behind those that are on their way."""
        predicted = limits.decode_seconds + tokens * limits.prefill_seconds_per_token
        return max(DEADLINE_FLOOR_SECONDS, DEADLINE_FACTOR * predicted * (len(self) + 1))
