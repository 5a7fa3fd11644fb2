"""The policies by name: `callbacks.divergence.policy=NAME`."""

from callbacks.policies.adagc import AdaGC
from callbacks.policies.base import Policy
from callbacks.policies.rollback import Rollback
from callbacks.policies.skip import Skip
from callbacks.policies.stop import Stop
from callbacks.policies.warn import Warn
from callbacks.policies.zclip import ZClip

POLICIES: dict[str, type[Policy]] = {
    "warn": Warn,
    "skip": Skip,
    "zclip": ZClip,
    "adagc": AdaGC,
    "rollback": Rollback,
    "stop": Stop,
}
