"""Who is served next: by priority, then the client with the fewest running, then who came first; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.coordinator.engine.sequence import Session


class WaitingQueue:
    """Sessions without a place; `next` looks and `take` takes."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(sorted(self._sessions.values(), key=lambda session: (session.priority, session.arrival)))

    def add(self, session: Session) -> None:
        """A session that comes for the first time stands behind its client's others of the same priority."""
        self._arrivals += 1
        session.arrival = self._arrivals
        self._sessions[session.session_id] = session

    def put_back(self, session: Session) -> None:
        """One that had a place and lost it stands where it stood by its arrival."""
        self._sessions[session.session_id] = session

    def take(self, session: Session) -> None:
        """It has its place."""
        del self._sessions[session.session_id]

    def remove(self, session_id: str) -> bool:
        """Forget one that no longer waits; False when it did not."""
        return self._sessions.pop(session_id, None) is not None

    def next(self, running_by_client: Mapping[str, int]) -> Session | None:
        """Whose turn it is. It is not overtaken by one that needs less room, so that a long request comes to its turn.

        Clients take turns by what they have running already, so that one with many requests does not keep the others
        waiting; within one client the first that came goes first.
        """
        return min(
            self._sessions.values(),
            key=lambda session: (session.priority, running_by_client.get(session.client_name, 0), session.arrival),
            default=None,
        )
