"""The policies by name: `callbacks.divergence.policy=NAME`."""

from callbacks.divergence.policies.adagc import AdaGC
from callbacks.divergence.policies.base import Policy
from callbacks.divergence.policies.rollback import Rollback
from callbacks.divergence.policies.skip import Skip
from callbacks.divergence.policies.stop import Stop
from callbacks.divergence.policies.warn import Warn
from callbacks.divergence.policies.zclip import ZClip

POLICIES: dict[str, type[Policy]] = {
    "warn": Warn,
    "skip": Skip,
    "zclip": ZClip,
    "adagc": AdaGC,
    "rollback": Rollback,
    "stop": Stop,
}
