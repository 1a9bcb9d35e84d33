"""Run the coordinator: `python -m services.coordinator`, configured by environment variables."""

from noodle.config.environment import coordinator_config, process_environment
from noodle.web.service import run_service
from services.coordinator.app import CoordinatorService

if __name__ == "__main__":
    run_service("coordinator", lambda: CoordinatorService(coordinator_config(process_environment())))
