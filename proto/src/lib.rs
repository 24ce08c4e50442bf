//! The wire of Sluice and nothing else: generated types and service of `sluice.v1`.

/// Generated from `sluice/v1/*.proto`, which is also their documentation.
#[expect(missing_docs, clippy::allow_attributes, clippy::pedantic, reason = "generated code; the .proto files document it")]
pub mod v1 {
    tonic::include_proto!("sluice.v1");
}

/// The encoded file descriptor set of `sluice.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sluice.v1.bin"));
