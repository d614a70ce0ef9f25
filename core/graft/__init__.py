"""What is inserted into a backbone, and the hooks that run it."""

from core.graft.additive import AdditiveGraft
from core.graft.arguments import Call, hidden_in, hidden_name, hidden_out
from core.graft.checkpointing import checkpoint_activations
from core.graft.graft import VERBS, Attention, Graft, Tap, hooks_of, route_rows
from core.graft.hooks import SiteHooks, connect, disconnect, refresh, run_at
from core.graft.rewrite import Effective, apply_weight

Carrier = SiteHooks  # its former name

__all__ = ["VERBS", "AdditiveGraft", "Attention", "Call", "Carrier", "Effective", "Graft", "SiteHooks", "Tap",
           "apply_weight", "checkpoint_activations", "connect", "disconnect", "hidden_in", "hidden_name", "hidden_out",
           "hooks_of", "refresh", "route_rows", "run_at"]
