from family_fixtures import *  # noqa: F403 - fixtures shared by several folders of tests
from lora_fixtures import *  # noqa: F403
