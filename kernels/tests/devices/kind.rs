use sluice_kernels::device::{DeviceError, DeviceKind, ParseDeviceError, open};

#[test]
fn names_parse_and_print_the_same() {
    for kind in DeviceKind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
        assert!(open(kind, 1).expect("one thread").name().starts_with(&kind.to_string()));
    }
}

#[test]
fn cuda_is_refused_by_name_and_never_replaced() {
    for text in ["cuda", "cuda:0"] {
        let error = text.parse::<DeviceKind>().expect_err("this build has no CUDA device");
        assert_eq!(error, ParseDeviceError::Cuda { text: text.to_owned() });
        assert!(error.to_string().contains("looked for the CUDA device"), "{error}");
    }
    assert_eq!("gpu".parse::<DeviceKind>(), Err(ParseDeviceError::Unknown { text: "gpu".to_owned() }));
}

#[test]
fn thread_counts_have_bounds() {
    for threads in [0, 257] {
        assert!(matches!(open(DeviceKind::Cpu, threads), Err(DeviceError::Threads { threads: given, max: 256 }) if given == threads));
    }
}
