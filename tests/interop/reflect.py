"""Knows only the address and a key: lists and describes the services by reflection, calls them, streams, and reads the
details of an error. Arguments: address, key."""

import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

address, key = sys.argv[1:]
channel = grpc.insecure_channel(address)
database = ProtoReflectionDescriptorDatabase(channel)
services = set(database.get_services())
expected = {"shortkit.webhooks.v1.WebhookService", "shortkit.webhooks.v1.DeliveryService", "grpc.health.v1.Health"}
assert expected <= services, services
pool = descriptor_pool.DescriptorPool(database)
# What errors carry can be read by those who know nothing beforehand.
for name in ["google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"]:
    assert pool.FindMessageTypeByName(name).fields
METADATA = [("authorization", f"Bearer {key}")]


def method(service, name):
    descriptor = pool.FindServiceByName(service).FindMethodByName(name)
    request = message_factory.GetMessageClass(descriptor.input_type)
    response = message_factory.GetMessageClass(descriptor.output_type)
    make = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
    call = make(
        f"/{service}/{name}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    return lambda metadata=METADATA, **fields: call(request(**fields), metadata=metadata, timeout=30)


webhooks, deliveries = "shortkit.webhooks.v1.WebhookService", "shortkit.webhooks.v1.DeliveryService"
health = method("grpc.health.v1.Health", "Check")
for service in ["", webhooks, deliveries]:
    assert health(metadata=[], service=service).status == 1

created = method(webhooks, "CreateWebhook")(url="https://example.com/hook", events=["content.ready"]).webhook
assert created.id.startswith("whk_") and created.secret.startswith("whsec_")
listed = method(webhooks, "ListWebhooks")()
assert listed.total == 1 and listed.webhooks[0].id == created.id and not listed.webhooks[0].secret

stream = method(deliveries, "WatchDeliveries")(webhook_id=created.id)
# The stream has begun once its headers are there; what is published now is on it.
stream.initial_metadata()
published = method(deliveries, "PublishEvent")(event="content.ready", data='{"n": 1e400}')
assert published.deliveries == 1
change = next(iter(stream))
assert change.webhook_id == created.id and change.resume_token
stream.cancel()

try:
    method(webhooks, "CreateWebhook")(url="https://example.com/hook", events=["content.ready", "nope"])
    raise AssertionError("an unknown event type was accepted")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    details = rpc_status.from_call(error).details
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert any(detail.Unpack(info) for detail in details) and info.reason == "VALIDATION_ERROR"
    assert any(detail.Unpack(bad) for detail in details) and bad.field_violations[0].field == "events[1]"
try:
    health(metadata=[], service="nope")
    raise AssertionError("an unknown service is healthy")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND
print("all calls answered")
