"""Who calls the Fleet service: what a caller's metadata says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class FleetCaller:
    """A caller without a tenant is a service that has checked for itself; with TLS only services can connect."""

    tenant: str | None
    operator: bool

    @classmethod
    def of(cls, context: Any) -> FleetCaller:
        """The caller behind a call, by its metadata `llmos-tenant` and `llmos-role`."""
        said = dict(context.invocation_metadata() or ())
        tenant = said.get("llmos-tenant")
        return cls(tenant, tenant is None or said.get("llmos-role") == "operator")

    def owns(self, tenant: str) -> bool:
        """Whether what belongs to `tenant` may be steered."""
        return self.operator or tenant == self.tenant

    def require_operator(self, what: str) -> None:
        """Raises PermissionDenied."""
        if not self.operator:
            raise PermissionDenied(f"Only an operator may {what}.")
