//! Append, seal, and finding a prefix again.

use crate::support::{append, check_rows, check_slots, config, open, register, shape, start, tokens};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_open_finds_every_full_chunk_and_the_same_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    for window in [None, Some(600)] {
        let shape = shape(window);
        let request = sluice_daemon::engine::command::RegisterModel { name: format!("{window:?}"), ..crate::support::registration(&shape) };
        let model = engine.register_model(request).await.expect("registered").model;
        let prompt = tokens(2100, 1);
        let first = open(&engine, model, &prompt).await;
        assert_eq!(first.matched_tokens, 0);
        append(&engine, first.lease, &shape, &prompt, 0).await;
        check_rows(&engine, first.lease, &shape, &prompt).await;
        engine.close(first.lease).await.expect("closed");

        let second = open(&engine, model, &prompt).await;
        assert_eq!(second.matched_tokens, 2048, "eight full chunks of 2100 tokens");
        append(&engine, second.lease, &shape, &prompt, 2048).await;
        check_rows(&engine, second.lease, &shape, &prompt).await;

        let mut other = prompt.clone();
        other[1000] ^= 1;
        let third = open(&engine, model, &other).await;
        assert_eq!(third.matched_tokens, if window.is_some() { 0 } else { 768 }, "window rows are kept at the prompt's end only");
        engine.close(third.lease).await.expect("closed");
        engine.close(second.lease).await.expect("closed");
    }
    check_slots(&engine).await.expect("slots add up");
    engine.shutdown().await.expect("stopped");
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_and_extra_keys_keep_prefixes_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = start(config(folder.path()));
    let shape = shape(None);
    let model = register(&engine, &shape).await;
    let request = sluice_daemon::engine::command::RegisterModel { namespace: "other".to_owned(), ..crate::support::registration(&shape) };
    let elsewhere = engine.register_model(request).await.expect("registered").model;
    let prompt = tokens(600, 3);
    let lease = open(&engine, model, &prompt).await.lease;
    append(&engine, lease, &shape, &prompt, 0).await;
    engine.close(lease).await.expect("closed");

    assert_eq!(open(&engine, model, &prompt).await.matched_tokens, 512);
    assert_eq!(open(&engine, elsewhere, &prompt).await.matched_tokens, 0, "another namespace sees nothing");
    let mut request = crate::support::open_request(model, &prompt);
    request.extra_keys = vec![b"adapter".to_vec()];
    assert_eq!(engine.open(request).await.expect("opened").matched_tokens, 0, "another adapter sees nothing");
}
