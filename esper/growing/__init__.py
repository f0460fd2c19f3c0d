"""Growing networks of users' own: `esper.grow` puts a controller into an ordinary training loop."""

from esper.growing.baking import Grown, regrow
from esper.growing.growth import Growth, grow
from esper.growing.report import Decision, Report
from esper.hosts.anatomy import Slot
from esper.hosts.budget import Budget

__all__ = ["Budget", "Decision", "Grown", "Growth", "Report", "Slot", "grow", "regrow"]
