from family_fixtures import *  # noqa: F403
