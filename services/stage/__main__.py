"""Run a stage: `python -m services.stage`, configured by its environment."""

from noodle.config.environment import process_environment, stage_config
from noodle.web.service import run_service
from services.stage.app import StageService

if __name__ == "__main__":
    run_service("stage", lambda: StageService(stage_config(process_environment())))
