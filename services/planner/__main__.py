"""Run the planner, configured by its environment: `python -m services.planner`."""

from noodle.config.environment import planner_config, process_environment
from noodle.web.service import run_service
from services.planner.app import PlannerService

if __name__ == "__main__":
    run_service("planner", lambda: PlannerService(planner_config(process_environment())))
