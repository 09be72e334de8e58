//! Each primitive, against a scripted server: what is on the wire is what was asked for, however wrong.

mod support;

use iommu_proto::pb;
use iommu_proto::pb::device_to_server::Message as Up;
use iommu_proto::pb::server_to_device::Message as Down;
use rogue::language::Answer;
use rogue::text::{Address, Hex};
use support::{Bench, CONNECT};
use tonic::{Code, Status};

#[tokio::test]
async fn it_says_hello_as_anybody_and_tells_how_it_was_received() {
    let mut bench = Bench::start().await;
    let line =
        r#"{"do":"connect","name":"somebody","address":"0007:1f:1f.7","schema_version":9,"mmio_credits":0}"#;
    let (answer, _script, hello) = bench.connected(line, 64).await;
    assert_eq!((hello.name.as_str(), hello.schema_version, hello.mmio_credits), ("somebody", 9, 0));
    assert_eq!(hello.address, Some(pb::DeviceAddress { segment: 7, source_id: 0x1fff }));
    let Answer::Connected { generation: 3, assignment_generation: 5, dma_credits: 64, .. } = answer else {
        panic!("{answer:?}")
    };
}

#[tokio::test]
async fn an_operation_is_on_the_wire_as_it_was_told() {
    type Check = fn(&pb::DmaBatch) -> bool;
    let cases: &[(&str, Check)] = &[
        (r#"{"do":"dma","iova":"0x1000","size":8}"#, |b| {
            b.kind[..] == [0] && b.size_bytes == [8] && b.iova == [0x1000]
        }),
        (r#"{"do":"dma","kind":"write","iova":4096,"data":"cafe"}"#, |b| {
            b.payload[..] == [0xca, 0xfe] && b.size_bytes == [2]
        }),
        (r#"{"do":"dma","kind":"posted_write","iova":0,"size":3,"fill":7}"#, |b| {
            b.kind[..] == [2] && b.payload[..] == [7; 3]
        }),
        (r#"{"do":"dma","kind":"cas","iova":0,"size":4,"fill":1}"#, |b| {
            b.kind[..] == [5] && b.payload.len() == 8
        }),
        (r#"{"do":"dma","iova":"0xffffffffffffffff","size":4294}"#, |b| {
            b.iova == [u64::MAX] && b.size_bytes == [4294]
        }),
        (r#"{"do":"dma","iova":0,"size":8,"pasid":4294967295}"#, |b| b.pasid == Some(u32::MAX)),
        (r#"{"do":"dma","iova":0,"size":8,"address_type":2}"#, |b| b.address_type == 2),
        (r#"{"do":"dma","iova":0,"size":8}"#, |b| b.assignment_generation == Some(5)),
        (r#"{"do":"dma","iova":0,"size":8,"generation":"absent"}"#, |b| b.assignment_generation.is_none()),
        (r#"{"do":"dma","iova":0,"size":8,"generation":{"number":99}}"#, |b| {
            b.assignment_generation == Some(99)
        }),
        (r#"{"do":"dma","iova":0,"size":8,"generation":{"ahead":-1}}"#, |b| {
            b.assignment_generation == Some(4)
        }),
        (r#"{"do":"msi","address":"0xfee00000","data":"3000000000"}"#, |b| {
            b.iova == [0xfee0_0000] && b.payload.len() == 5
        }),
        (
            r#"{"do":"raw","iova":[1,2],"size":[1,2,3],"kind":"ff","payload":"00","zeros":3,"repeat":3,"first_tag":9}"#,
            |b| {
                b.iova.len() == 6
                    && b.size_bytes.len() == 3
                    && b.kind[..] == [0xff; 3]
                    && b.payload.len() == 4
                    && b.first_tag == 9
            },
        ),
    ];
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    for (line, check) in cases {
        let (_, batch) = bench.play(line, script.answer(&[], &[])).await;
        assert!(check(&batch), "{line}: {batch:?}");
    }
}

#[tokio::test]
async fn a_refusal_and_a_success_are_told_as_they_are() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let line = r#"{"do":"dma","iova":"0x1000","size":2}"#;
    let (answer, _) = bench.play(line, script.answer(&[1, 2], &[])).await;
    assert_eq!(answer, Answer::Done { data: Hex(vec![1, 2]) });
    let (answer, _) = bench.play(line, script.answer(&[], &[(0, 0x1001)])).await;
    let Answer::Fault(fault) = answer else { panic!("{answer:?}") };
    assert_eq!((fault.reason, fault.iova), (Address(0x1001), Address(0x1000)));
    let script = async {
        script.batch().await;
        script.end(Status::new(Code::FailedPrecondition, "enough"));
    };
    let (answer, ()) = bench.play(line, script).await;
    let Answer::Ended(end) = answer else { panic!("{answer:?}") };
    assert!(end.message.contains("enough"), "{end:?}");
}

#[tokio::test]
async fn a_scan_tells_which_addresses_answered_and_where_the_canary_is() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let line = r#"{"do":"scan","from":"0x1000","to":"0x3fff","stride":"0x1000","size":4,"canary":"4b4559"}"#;
    let (answer, batch) = bench.play(line, script.answer(b".KEYnone", &[(1, 6)])).await;
    assert_eq!(batch.iova, [0x1000, 0x2000, 0x3000]);
    let Answer::Scanned { tried: 3, answered: 2, canary_at, refused, .. } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!((canary_at, refused.get("0x6")), (vec![Address(0x1000)], Some(&1)));
}

#[tokio::test]
async fn what_a_scan_found_before_its_session_ended_is_told() {
    let scan = r#"{"do":"scan","from":"0x0","to":"0x400fff","stride":"0x1000","size":4,"canary":"4b4559"}"#;
    for (line, payload, canaries) in
        [(scan, &b".KEY"[..], 1), (r#"{"do":"guess_interrupts","from":0,"to":1024}"#, &b""[..], 0)]
    {
        let mut bench = Bench::start().await;
        let mut script = bench.usual().await;
        let serving = async {
            script.answer(payload, &[(511, 6)]).await;
            script.batch().await;
            script.end(Status::new(Code::FailedPrecondition, "enough"));
        };
        let (answer, ()) = bench.play(line, serving).await;
        let Answer::Scanned { tried: 512, answered: 511, canary_at, ended: Some(end), .. } = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(canary_at.len(), canaries, "{line}");
        assert!(end.message.contains("enough"), "{end:?}");
    }
}

#[tokio::test]
async fn what_was_queued_goes_out_later_under_the_generation_of_its_time_even_through_a_reset_that_is_never_answered()
 {
    for (resets, generation_after) in [("hold", 5), ("answer", 6)] {
        let mut bench = Bench::start().await;
        let mut script = bench.usual().await;
        bench.tell(&format!(r#"{{"do":"behave","resets":"{resets}"}}"#)).await;
        let queued = bench.tell(r#"{"do":"dma","kind":"write","iova":4096,"data":"aa","later":true}"#).await;
        assert_eq!(queued, Answer::Queued { waiting: 1 });
        script.say(Down::Reset(pb::Reset { tag: 1, assignment_generation: 6 }));
        if resets == "answer" {
            assert_eq!(script.next().await, Up::ResetDone(pb::ResetDone { tag: 1 }));
        } else {
            support::soon("the reset", async {
                while !matches!(bench.device.obey(rogue::language::Command::Status).await, Some(Answer::Status(s)) if s.resets_told == 1) {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
        let (_, late) = bench.play(r#"{"do":"release"}"#, script.answer(&[], &[])).await;
        assert_eq!(late.assignment_generation, Some(5), "{resets}");
        let (_, new) = bench.play(r#"{"do":"dma","iova":0,"size":1}"#, script.answer(&[0], &[])).await;
        assert_eq!(new.assignment_generation, Some(generation_after), "{resets}");
        let (_, told) = bench
            .play(r#"{"do":"dma","iova":0,"size":1,"generation":"told"}"#, script.answer(&[0], &[]))
            .await;
        assert_eq!(told.assignment_generation, Some(6), "{resets}");
    }
}

#[tokio::test]
async fn what_is_released_is_told_as_one_batch_with_the_bytes_of_all() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    for line in [
        r#"{"do":"dma","iova":0,"size":3,"later":true}"#,
        r#"{"do":"dma","iova":4096,"size":1,"later":true}"#,
        r#"{"do":"dma","iova":8192,"size":2,"later":true}"#,
    ] {
        bench.tell(line).await;
    }
    let serving = async {
        script.answer(&[1, 2, 3], &[]).await;
        script.answer(&[], &[(0, 6)]).await;
        script.answer(&[4, 5], &[]).await;
    };
    let (answer, ()) = bench.play(r#"{"do":"release"}"#, serving).await;
    let Answer::Batch { succeeded: 2, faults, payload_bytes: 5, .. } = answer else { panic!("{answer:?}") };
    assert_eq!(faults.iter().map(|fault| fault.index).collect::<Vec<_>>(), [1]);
}

#[tokio::test]
async fn a_write_is_repeated_byte_for_byte() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let line = r#"{"do":"dma","kind":"write","iova":4096,"data":"cafe","generation":{"number":2}}"#;
    let (_, first) = bench.play(line, script.answer(&[], &[])).await;
    bench.play(r#"{"do":"dma","iova":0,"size":1}"#, script.answer(&[0], &[])).await;
    let (_, again) = bench.play(r#"{"do":"replay"}"#, script.answer(&[], &[])).await;
    assert_eq!(first, again);
}

#[tokio::test]
async fn it_answers_what_nobody_asked_and_says_hello_twice() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let (_, message) = bench.play(r#"{"do":"reset_done","tag":77}"#, script.next()).await;
    assert_eq!(message, Up::ResetDone(pb::ResetDone { tag: 77 }));
    let (_, message) = bench.play(r#"{"do":"mmio_answer","tag":78,"value":4}"#, script.next()).await;
    assert!(matches!(message, Up::Mmio(pb::MmioCompletion { tag: 78, .. })));
    let violated = async {
        let message = script.next().await;
        script.end(Status::new(Code::FailedPrecondition, "a second Hello"));
        message
    };
    let (answer, message) =
        bench.play(r#"{"do":"hello","name":"engine1","address":"00:02.0"}"#, violated).await;
    assert!(matches!(message, Up::Hello(hello) if hello.name == "engine1"));
    assert!(matches!(answer, Answer::Ended(_)), "{answer:?}");
}

#[tokio::test]
async fn registers_read_as_they_were_written_or_are_held() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let access = |tag, write_value| {
        Down::Mmio(pb::MmioRequest { tag, bar: 0, offset: 8, width_bytes: 8, write_value })
    };
    for (tag, written, value) in [(1, Some(42), 0), (2, None, 42)] {
        script.say(access(tag, written));
        let outcome = Some(pb::mmio_completion::Outcome::Value(value));
        assert_eq!(script.next().await, Up::Mmio(pb::MmioCompletion { tag, outcome }));
    }
    bench.tell(r#"{"do":"behave","registers":"hold"}"#).await;
    script.say(access(3, None));
    support::soon("the access", async {
        while !matches!(bench.device.obey(rogue::language::Command::Status).await, Some(Answer::Status(s)) if s.registers_held == [3]) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (_, message) = bench.play(r#"{"do":"mmio_answer","value":9}"#, script.next()).await;
    let outcome = Some(pb::mmio_completion::Outcome::Value(9));
    assert_eq!(message, Up::Mmio(pb::MmioCompletion { tag: 3, outcome }));
}

#[tokio::test]
async fn a_flood_goes_beyond_its_credits_when_it_is_told_so() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let line =
        r#"{"do":"flood","iova":0,"stride":4096,"span":3,"size":1,"operations":2,"batches":8,"in_flight":8}"#;
    let script = async {
        let mut batches = Vec::new();
        // Two credits, and all eight come before one is answered.
        for _ in 0..8 {
            batches.push(script.batch().await);
        }
        for batch in &batches {
            script.complete(batch, &[0], &[(1, 0x1002)]);
        }
        batches
    };
    let (answer, batches) = bench.play(line, script).await;
    assert_eq!(batches[1].iova, [0x2000, 0]);
    let Answer::Counted(counted) = answer else { panic!("{answer:?}") };
    assert_eq!((counted.succeeded, counted.refused.get("0x1002"), counted.ended), (8, Some(&8), None));
}

#[tokio::test]
async fn a_hammer_swings_until_it_is_stopped_and_tells_when_the_first_refusal_came() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    assert_eq!(
        bench.tell(r#"{"do":"hammer","iova":[4096],"size":4,"fill":1,"in_flight":1}"#).await,
        Answer::Well
    );
    for refused in [false, false, true] {
        script.answer(&[], if refused { &[(0, 5)] } else { &[] }).await;
    }
    let (answer, _) = bench.play(r#"{"do":"hammer_stop"}"#, script.answer(&[], &[(0, 5)])).await;
    let Answer::Counted(counted) = answer else { panic!("{answer:?}") };
    assert_eq!((counted.succeeded, counted.refused.get("0x5")), (2, Some(&2)));
    assert!(counted.last_success_unix_us <= counted.first_refusal_unix_us);
}

#[tokio::test]
async fn interrupts_are_guessed_index_by_index() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let (answer, batch) =
        bench.play(r#"{"do":"guess_interrupts","from":1,"to":2}"#, script.answer(&[], &[(0, 0x22)])).await;
    assert_eq!((batch.iova, batch.size_bytes), (vec![0xfee0_0030, 0xfee0_0050], vec![4]));
    let Answer::Scanned { tried: 2, answered: 1, .. } = answer else { panic!("{answer:?}") };
}

#[tokio::test]
async fn a_steady_load_tells_rates_and_latencies() {
    let mut bench = Bench::start().await;
    let mut script = bench.usual().await;
    let line =
        r#"{"do":"steady","iova":4096,"span":128,"size":64,"operations":1,"in_flight":1,"milliseconds":0}"#;
    let (answer, ()) = bench.play(line, async {}).await;
    assert!(matches!(answer, Answer::Measured { operations: 0, .. }), "{answer:?}");
    let line = line.replace(":0}", ":5}");
    let serving = async {
        // It sends one at least; the rest is as fast as this machine.
        script.answer(&[0; 64], &[]).await;
        loop {
            tokio::select! {
                batch = script.batch() => script.complete(&batch, &[0; 64], &[]),
                () = tokio::time::sleep(std::time::Duration::from_millis(200)) => break,
            }
        }
    };
    let (answer, ()) = bench.play(&line, serving).await;
    let Answer::Measured { operations, latency_us, .. } = answer else { panic!("{answer:?}") };
    assert!(operations > 0 && latency_us[0] <= latency_us[4]);
}

#[tokio::test]
async fn what_makes_no_sense_is_answered_and_the_session_stands() {
    let mut bench = Bench::start().await;
    let not_yet = bench.tell(r#"{"do":"dma","iova":0,"size":1}"#).await;
    assert!(matches!(&not_yet, Answer::Wrong { why } if why.contains("connect")), "{not_yet:?}");
    let _script = bench.usual().await;
    for line in [
        r#"{"do":"release"}"#,
        r#"{"do":"replay"}"#,
        r#"{"do":"hammer_stop"}"#,
        r#"{"do":"hammer","iova":[],"size":4,"fill":0}"#,
        r#"{"do":"scan","from":0,"to":18446744073709551615,"stride":1,"size":1}"#,
        r#"{"do":"scan","from":2,"to":1,"stride":1,"size":1}"#,
        r#"{"do":"scan","from":0,"to":1,"stride":0,"size":1}"#,
        r#"{"do":"scan","from":0,"to":1,"stride":1,"size":0}"#,
        r#"{"do":"scan","from":0,"to":1,"stride":1,"size":1,"canary":""}"#,
        r#"{"do":"guess_interrupts","from":2,"to":1}"#,
        r#"{"do":"dma","iova":0,"size":4294967295}"#,
        r#"{"do":"raw","iova":[0],"repeat":4294967295}"#,
        r#"{"do":"raw","iova":[0],"zeros":4294967295}"#,
        r#"{"do":"raw","iova":[],"kind":"ff","repeat":4294967295}"#,
        r#"{"do":"raw","iova":[0],"kind":"ffff","repeat":32769}"#,
        r#"{"do":"flood","iova":0,"size":1,"operations":0,"batches":1}"#,
        r#"{"do":"flood","iova":0,"size":4294967295,"operations":4294967295,"batches":1}"#,
        r#"{"do":"steady","iova":0,"span":0,"size":1,"operations":1,"milliseconds":1}"#,
        r#"{"do":"steady","iova":0,"span":9,"size":0,"operations":1,"milliseconds":1}"#,
        r#"{"do":"steady","iova":0,"span":9,"size":1,"operations":65537,"milliseconds":1}"#,
        r#"{"do":"reset_done"}"#,
        r#"{"do":"mmio_answer"}"#,
    ] {
        let answer = bench.tell(line).await;
        assert!(matches!(answer, Answer::Wrong { .. }), "{line}: {answer:?}");
    }
    // The queue is bounded in bytes: sixteen of the largest batches are as much as it holds.
    let large = r#"{"do":"dma","kind":"write","iova":0,"size":4194304,"later":true}"#;
    for waiting in 1..=16 {
        assert_eq!(bench.tell(large).await, Answer::Queued { waiting });
    }
    assert!(matches!(bench.tell(large).await, Answer::Wrong { .. }));
    let Answer::Status(status) = bench.tell(r#"{"do":"status"}"#).await else { panic!("a status") };
    assert!(status.connected && status.queued == 16);
    bench.tell(r#"{"do":"disconnect"}"#).await;
    assert!(matches!(bench.connected(CONNECT, 1).await.0, Answer::Connected { .. }));
}
