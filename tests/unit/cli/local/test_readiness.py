from __future__ import annotations

from services.cli.client.health import Health
from services.cli.local.readiness import shown_services


def shown(**statuses: str) -> list[str]:
    return shown_services({name: Health(status) for name, status in statuses.items()})


def test_while_a_stage_works_the_services_that_wait_for_it_are_not_shown() -> None:
    assert shown(planner="waiting", coordinator="starting", s0="starting", s1="waiting") == ["s0", "s1"]
    assert shown(planner="silent", coordinator="silent", s0="silent") == ["s0"]


def test_what_all_stages_wait_for_is_said_by_the_planner_and_then_by_the_coordinator() -> None:
    assert shown(planner="waiting", coordinator="starting", s0="waiting") == ["s0", "planner"]
    assert shown(planner="ready", coordinator="starting", s0="ready") == ["coordinator"]
    assert shown(planner="ready", coordinator="ready", s0="ready") == []
