"""The one error tree of llmos. A leaf knows its gRPC status, its HTTP status and whether a retry can help.

    LlmosError
    |-- ClientError                     the caller must change something
    |   |-- InvalidRequest              a field is missing, malformed or out of bounds   400
    |   |   |-- PromptTooLong           prompt + max_tokens exceed the context           400
    |   |   |-- UnsupportedFeature      the model or this release cannot do it           400
    |   |   |-- InvalidConstraint       a schema or regex that cannot be followed        400
    |   |   |-- MethodNotAllowed        the route exists, not for this HTTP method       405
    |   |   `-- UnsupportedMediaType    the body is not JSON by its headers              415
    |   |-- Unauthenticated             no key, or a wrong one                           401
    |   |-- PermissionDenied            the key's role does not allow it                 403
    |   |-- NotFound                    no such resource                                 404
    |   |   `-- ModelNotFound           the fleet does not serve that model              404
    |   |-- Quarantined                 workers died of the very same request           422
    |   |-- Conflict                    the request id is in use                         409
    |   |-- PayloadTooLarge             body or header over its limit                    413
    |   `-- Cancelled                   the client cancelled                             499
    |-- CapacityError                   the same request may succeed later
    |   |-- Overloaded                  a queue is full; wait `retry_after_s`            429
    |   |-- QuotaExceeded               the tenant's quota is used up; wait likewise     429
    |   |-- Unavailable                 no leader or no worker can be reached            503
    |   |-- DeadlineExceeded            the request's deadline passed                    504
    |   `-- SlowReader                  the client did not read its stream               408
    |-- FleetError                      between services; never shown to clients as such
    |   |-- NotLeader                   this scheduler does not lead; knows who does
    |   |-- StaleTerm                   a record carries a term below one already seen
    |   |-- DamagedMessage              its bytes changed on the way; the stream ends
    |   |-- AttemptLost                 worker died or broke the contract; re-dispatched
    |   |   `-- EngineLost              its engine ended under it: the request may be why
    |   |-- UnsoundOutput               a model gave what is no number; tried again elsewhere
    |   `-- EtcdError                   etcd refused or cannot be reached
    |       |-- EtcdUnavailable         no endpoint answered within the deadline
    |       |-- EtcdAuthFailed          user, password or role refused
    |       `-- LeaseLost               the lease expired or was revoked
    |-- SetupError                      shown to the person at the keyboard
    |   |-- ConfigError                 unknown key or bad value in a file, flag or variable
    |   |-- MissingExtra                an optional part is not installed; says what to install
    |   |-- SourceError                 a model source cannot be read or is not a model
    |   |-- StoreBusy                   another process holds a lock of the model store
    |   `-- StoreCorrupt                a blob does not match its hash
    `-- InternalError                   a bug; the client sees the request id only       500

Clients see `code`, the message and the request id, never a stack, a path or an address.
"""

from __future__ import annotations

import grpc


class LlmosError(Exception):
    """Root of the tree.

    `message` is one sentence for the person who must act on it. `param` names the offending field, if any.
    """

    code: str = "internal_error"
    grpc_status: grpc.StatusCode = grpc.StatusCode.INTERNAL
    http_status: int = 500
    retryable: bool = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ClientError(LlmosError):
    """The caller must change something before trying again."""

    code = "invalid_request"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400


class InvalidRequest(ClientError):
    """A field is missing, malformed or out of its bounds."""

    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    """Prompt plus `max_tokens` exceed the model's context."""

    code = "context_length_exceeded"


class UnsupportedFeature(InvalidRequest):
    """The model, or this release, does not offer what was asked for."""

    code = "unsupported_feature"


class InvalidConstraint(InvalidRequest):
    """What the output must look like is contradictory, malformed, or too complex to follow."""

    code = "invalid_constraint"


class MethodNotAllowed(InvalidRequest):
    """The route exists, but not for this HTTP method."""

    code = "method_not_allowed"
    http_status = 405


class UnsupportedMediaType(InvalidRequest):
    """The body's headers say that it is something else than plain JSON."""

    code = "unsupported_media_type"
    http_status = 415


class Unauthenticated(ClientError):
    """No key, or one that nobody issued."""

    code = "invalid_api_key"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class PermissionDenied(ClientError):
    """The key is known; its role does not allow this call."""

    code = "permission_denied"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class NotFound(ClientError):
    """There is no such resource."""

    code = "not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class ModelNotFound(NotFound):
    """The fleet does not serve a model of that name."""

    code = "model_not_found"


class Conflict(ClientError):
    """The request id is already in use."""

    code = "conflict"
    grpc_status = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409


class Quarantined(ClientError):
    """Workers died of this request, or of one that was the same; it is not run again for a while."""

    code = "request_quarantined"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 422


class PayloadTooLarge(ClientError):
    """A body or header is larger than its limit."""

    code = "payload_too_large"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413


class Cancelled(ClientError):
    """The client, or an operator, cancelled the request."""

    code = "cancelled"
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499


class CapacityError(LlmosError):
    """Nothing is wrong with the request; it may succeed later."""

    code = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True


class Overloaded(CapacityError):
    """A bounded queue is full, or too long for the request's deadline; `retry_after_s` says when to come back."""

    code = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429


class QuotaExceeded(CapacityError):
    """The tenant has used up one of its quotas, which the message names; `retry_after_s` says when to come back."""

    code = "quota_exceeded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429


class Unavailable(CapacityError):
    """No leading scheduler, or no worker that could serve the request, can be reached."""

    code = "unavailable"


class DeadlineExceeded(CapacityError):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class SlowReader(CapacityError):
    """The client did not read its stream; its bounded buffer ran full."""

    code = "slow_reader"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 408


class FleetError(LlmosError):
    """Between services; mapped to something else before a client could see it."""

    code = "fleet_error"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 503
    retryable = True


class NotLeader(FleetError):
    """This scheduler does not lead. `leader_address` is host:port of the one that does, or "" if unknown."""

    code = "not_leader"

    def __init__(self, message: str, *, leader_address: str = "") -> None:
        super().__init__(message)
        self.leader_address = leader_address


class StaleTerm(FleetError):
    """A record carries a term lower than one already seen by its receiver."""

    code = "stale_term"


class DamagedMessage(FleetError):
    """A message does not match its checksum: the stream is not to be trusted any more."""

    code = "damaged_message"
    grpc_status = grpc.StatusCode.DATA_LOSS


class AttemptLost(FleetError):
    """A worker died or broke the stream's contract; the scheduler re-dispatches."""

    code = "attempt_lost"
    grpc_status = grpc.StatusCode.ABORTED


class EngineLost(AttemptLost):
    """The engine that computed the attempt ended."""

    code = "engine_lost"


class UnsoundOutput(FleetError):
    """A model's logits or values are not numbers. Most often the worker's doing, so another one may do better."""

    code = "unsound_output"
    grpc_status = grpc.StatusCode.DATA_LOSS


class EtcdError(FleetError):
    """etcd refused a call."""

    code = "etcd_error"


class EtcdUnavailable(EtcdError):
    """No etcd endpoint answered within the deadline."""

    code = "etcd_unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE


class EtcdAuthFailed(EtcdError):
    """etcd refused the user, the password or the role."""

    code = "etcd_auth_failed"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    retryable = False


class LeaseLost(EtcdError):
    """The lease expired or was revoked; the right to write intent went with it."""

    code = "lease_lost"


class SetupError(LlmosError):
    """Shown to the person at the keyboard; says what to do next."""

    code = "setup_error"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class ConfigError(SetupError):
    """An unknown key or a bad value in a file, flag or environment variable."""

    code = "config_error"


class MissingExtra(SetupError):
    """An optional part is not installed."""

    code = "missing_extra"

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the '{extra}' extra: pip install 'llmos[{extra}]'")
        self.extra = extra


class SourceError(SetupError):
    """A model source cannot be read, or is not a model."""

    code = "source_error"


class StoreBusy(SetupError):
    """Another process holds a lock of the model store."""

    code = "store_busy"


class StoreCorrupt(SetupError):
    """A blob in the model store does not match its hash."""

    code = "store_corrupt"


class InternalError(LlmosError):
    """A bug. The client sees the request id, the log has the rest."""

    code = "internal_error"


def _leaves(root: type[LlmosError]) -> dict[str, type[LlmosError]]:
    found: dict[str, type[LlmosError]] = {}
    for child in root.__subclasses__():
        found.setdefault(child.code, child)
        found.update(_leaves(child))
    return found


def from_code(code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> LlmosError:
    """Rebuild an error that crossed the wire as `(code, message)`; who leads does not cross. An unknown code becomes
    InternalError."""
    kind = _leaves(LlmosError).get(code, InternalError)
    if kind is NotLeader:
        return NotLeader(message)
    if kind is MissingExtra:
        kind = InternalError
    return kind(message, param=param, retry_after_s=retry_after_s)
