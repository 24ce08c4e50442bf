"""A Sluice client in a page: plain gRPC, message types from the daemon's own reflection, nothing generated."""

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from google.protobuf import descriptor_pb2

SERVICE = "sluice.v1.Sluice"


class Sluice:
    """Calls of the service by their names in the .proto; messages by theirs."""

    def __init__(self, target, message_bytes=64 << 20):
        options = [
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            # For a Unix socket grpcio would send its escaped path as the authority, which strict HTTP/2 servers refuse.
            ("grpc.default_authority", "localhost"),
        ]
        self.channel = grpc.insecure_channel(target, options)
        self.pool = _reflect(self.channel)
        for method in self.pool.FindServiceByName(SERVICE).methods:
            setattr(self, method.name, self._callable(method))

    def message(self, kind, /, **fields):
        """A message of `sluice.v1`, such as `message("OpenRequest", model_id=1)`."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(f"sluice.v1.{kind}"))(**fields)

    def _callable(self, method):
        kinds = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, False): self.channel.stream_unary,
            (True, True): self.channel.stream_stream,
        }
        reply = message_factory.GetMessageClass(method.output_type)
        return kinds[method.client_streaming, method.server_streaming](
            f"/{SERVICE}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )


def _reflect(channel):
    """A pool with the file that declares the service, and those it needs, asked from the daemon."""
    # The v1 protocol has the messages of v1alpha under another name, so that its Python package serves for both.
    ask = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    pool = descriptor_pool.DescriptorPool()
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
    for reply in ask(iter([request]), timeout=10):
        if reply.HasField("error_response"):
            raise RuntimeError(reply.error_response.error_message)
        for file in reply.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(file))
    return pool
