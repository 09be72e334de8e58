//! DMA on the wire: golden bytes, the rules of a batch, and both sides against each other.

use bytes::Bytes;
use expect_test::{Expect, expect};
use iommu_proto::dma::{
    Action, AtomicValue, Batch, BatchError, BatchLimits, BatchShape, BatchView, CompletionsBuilder,
    reason_code, reason_from_code, refuse_whole,
};
use iommu_proto::pb;
use iommu_types::{AtomicOperation, DmaFault, FaultReason, Iova, Pasid, Refusal};
use proptest::prelude::*;
use prost::Message as _;

const LIMITS: BatchLimits = BatchLimits { operations_max: 8, bytes_max: 256 };

fn check_parse(batch: pb::DmaBatch, expected: Expect) {
    let shown = match BatchView::parse(&batch, LIMITS) {
        Ok(view) => view.operations().map(|operation| format!("{operation:?}\n")).collect(),
        Err(BatchError::Columns(error)) => format!("columns: {error}"),
        Err(BatchError::Operations(error)) => format!("operations: {error}"),
        Err(BatchError::Bytes(error)) => format!("bytes: {error}"),
    };
    expected.assert_eq(&shown);
}

fn batch(iova: &[u64], size_bytes: &[u32], kind: &[u8], payload: &[u8]) -> pb::DmaBatch {
    pb::DmaBatch {
        first_tag: 7,
        iova: iova.to_vec(),
        size_bytes: size_bytes.to_vec(),
        kind: Bytes::copy_from_slice(kind),
        payload: Bytes::copy_from_slice(payload),
        pasid: None,
        address_type: 0,
        assignment_generation: None,
    }
}

/// Two reads and a write, as the README shows them.
fn example() -> (pb::DmaBatch, BatchShape) {
    let mut batch = Batch::new();
    batch.read(Iova::new(0x1000), 4).write(Iova::new(0x2000), &b"hi"[..]).read(Iova::new(0x3000), 4);
    batch.into_message(9)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_bytes_of_a_batch_and_of_its_answer_do_not_change() {
    let (batch, _) = example();
    let golden = hex(&batch.encode_to_vec());
    expect!["08 09 12 18 00 10 00 00 00 00 00 00 00 20 00 00 00 00 00 00 00 30 00 00 00 00 00 00 1a 03 04 02 04 22 03 00 01 00 2a 02 68 69"].assert_eq(&golden);
    assert!(include_str!("../README.md").contains(&golden), "proto/README.md shows these bytes");

    let view = BatchView::parse(&batch, BatchLimits::CONTRACT).expect("our own batch parses");
    let mut answer = CompletionsBuilder::new(&view);
    for operation in view.operations() {
        if operation.index == 2 {
            let reason = Ok(FaultReason::READ_DENIED);
            answer.failed(&operation, DmaFault { done_bytes: 0, iova: operation.iova, reason });
        } else {
            let results = answer.results();
            results.resize(results.len() + operation.result_bytes() as usize, 0xab);
            answer.succeeded(&operation);
        }
    }
    let golden = hex(&answer.finish().encode_to_vec());
    expect!["08 09 12 04 ab ab ab ab 1a 01 02 22 01 06 2a 08 00 30 00 00 00 00 00 00 32 01 00"]
        .assert_eq(&golden);
    assert!(include_str!("../README.md").contains(&golden), "proto/README.md shows these bytes");
}

#[test]
fn one_element_stands_for_all_and_no_kinds_are_reads() {
    check_parse(
        batch(&[0x1000, 0x2000], &[64], &[], &[]),
        expect![[r#"
        Operation { index: 0, iova: iova:0x1000, size_bytes: 64, action: Read }
        Operation { index: 1, iova: iova:0x2000, size_bytes: 64, action: Read }
    "#]],
    );
    check_parse(
        batch(&[0x1000, 0x2000], &[1, 2], &[1], b"abc"),
        expect![[r#"
        Operation { index: 0, iova: iova:0x1000, size_bytes: 1, action: Write { data: [97], posted: false } }
        Operation { index: 1, iova: iova:0x2000, size_bytes: 2, action: Write { data: [98, 99], posted: false } }
    "#]],
    );
    check_parse(batch(&[], &[64], &[], &[]), expect![[""]]);
}

#[test]
fn atomics_carry_their_operands_in_little_endian() {
    let operands =
        [&1_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &3_u32.to_le_bytes(), &4_u32.to_le_bytes()];
    check_parse(
        batch(&[0, 8, 16], &[4, 8, 4], &[3, 4, 5], &operands.concat()),
        expect![[r#"
        Operation { index: 0, iova: iova:0x0, size_bytes: 4, action: Atomic(FetchAdd32(1)) }
        Operation { index: 1, iova: iova:0x8, size_bytes: 8, action: Atomic(Swap64(2)) }
        Operation { index: 2, iova: iova:0x10, size_bytes: 4, action: Atomic(Cas32 { compare: 3, new: 4 }) }
    "#]],
    );
}

#[test]
fn an_operation_that_is_nonsense_is_refused_alone() {
    let kinds = [9, 1, 3, 0];
    check_parse(
        batch(&[0, 1, 2, 3], &[64, 0, 3, 1], &kinds, b"abc"),
        expect![[r#"
        Operation { index: 0, iova: iova:0x0, size_bytes: 64, action: Malformed }
        Operation { index: 1, iova: iova:0x1, size_bytes: 0, action: Malformed }
        Operation { index: 2, iova: iova:0x2, size_bytes: 3, action: Malformed }
        Operation { index: 3, iova: iova:0x3, size_bytes: 1, action: Read }
    "#]],
    );
}

#[test]
fn columns_that_do_not_add_up_are_the_peers_fault() {
    check_parse(
        batch(&[0, 1], &[1, 2, 3], &[], &[]),
        expect!["columns: dma.size_bytes: has 3 elements; needs one for each of 2 addresses, or one"],
    );
    check_parse(
        batch(&[0, 1], &[], &[], &[]),
        expect!["columns: dma.size_bytes: has 0 elements; needs one for each of 2 addresses, or one"],
    );
    check_parse(
        batch(&[0, 1, 2], &[1], &[0, 0], &[]),
        expect!["columns: dma.kind: has 2 elements; needs one for each of 3 addresses, or one"],
    );
    check_parse(
        batch(&[0], &[4], &[1], b"abc"),
        expect!["columns: dma.payload: has 3 bytes; the operations take 4"],
    );
    check_parse(
        batch(&[0], &[4], &[0], b"abc"),
        expect!["columns: dma.payload: has 3 bytes; the operations take 0"],
    );
    check_parse(
        pb::DmaBatch { pasid: Some(1 << 20), ..batch(&[0], &[4], &[], &[]) },
        expect!["columns: dma.pasid: 1048576 needs more than 20 bits"],
    );
    check_parse(
        pb::DmaBatch { address_type: 3, ..batch(&[0], &[4], &[], &[]) },
        expect!["columns: dma.address_type: 3 is not 0, 1 or 2"],
    );
    check_parse(
        pb::DmaBatch { first_tag: u64::MAX, ..batch(&[0], &[4], &[], &[]) },
        expect!["columns: dma.first_tag: 1 tags from 18446744073709551615 wrap"],
    );
}

#[test]
fn a_batch_over_its_limits_says_which() {
    check_parse(
        batch(&[0; 9], &[1], &[], &[]),
        expect!["operations: the limit batch_operations_max of 8 is reached"],
    );
    check_parse(
        batch(&[0; 8], &[33], &[], &[]),
        expect!["bytes: the limit batch_bytes_max of 256 is reached"],
    );
    check_parse(
        batch(&[0; 2], &[u32::MAX], &[], &[]),
        expect!["bytes: the limit batch_bytes_max of 256 is reached"],
    );
    check_parse(
        batch(&[0; 2], &[129], &[1, 0], &[0; 129]),
        expect!["bytes: the limit batch_bytes_max of 256 is reached"],
    );
}

#[test]
fn a_batch_counts_its_bytes_as_its_reader_does() {
    let mut batch = Batch::new().with_pasid(Pasid::new(5).expect("20 bits"));
    batch.read(Iova::new(0), 200).swap(Iova::new(0), AtomicValue::U32(1)).write_slice(Iova::new(0), &[0; 48]);
    assert_eq!((batch.len(), batch.bytes()), (3, 256));
    let (message, _) = batch.clone().into_message(1);
    assert_eq!(message.pasid, Some(5));
    BatchView::parse(&message, LIMITS).expect("a full batch parses");
    batch.read(Iova::new(0), 1);
    let (message, _) = batch.into_message(1);
    assert!(matches!(BatchView::parse(&message, LIMITS), Err(BatchError::Bytes(_))));
}

#[test]
fn reasons_and_codes_are_one_to_one() {
    for code in (0..=0x1_0000).chain([u32::MAX]) {
        assert_eq!(reason_code(reason_from_code(code)), code);
    }
    assert_eq!(reason_code(Err(Refusal::OverLimit)), 0x1002);
    assert_eq!(reason_from_code(0x1007), Err(Refusal::Unknown(0x1007)), "a later version may have more");
}

fn check_results(change: impl FnOnce(&mut pb::DmaCompletions), expected: Expect) {
    let (batch, shape) = example();
    let mut completions = refuse_whole(&batch, Refusal::Fenced);
    change(&mut completions);
    let shown = match shape.complete(completions) {
        Ok(completed) => completed.results().map(|result| format!("{result:?}\n")).collect(),
        Err(error) => error.to_string(),
    };
    expected.assert_eq(&shown);
}

#[test]
fn an_answer_that_does_not_fit_its_batch_is_named() {
    check_results(
        |_| (),
        expect![[r#"
        OperationResult { bytes: [], fault: Some(DmaFault { done_bytes: 0, iova: iova:0x1000, reason: Err(Fenced) }) }
        OperationResult { bytes: [], fault: Some(DmaFault { done_bytes: 0, iova: iova:0x2000, reason: Err(Fenced) }) }
        OperationResult { bytes: [], fault: Some(DmaFault { done_bytes: 0, iova: iova:0x3000, reason: Err(Fenced) }) }
    "#]],
    );
    check_results(|answer| answer.first_tag = 8, expect!["dma.first_tag: is 8; the oldest batch has 9"]);
    check_results(
        |answer| answer.fault_iova.clear(),
        expect!["dma.fault_iova: has 0 elements; fault_index has 3"],
    );
    check_results(
        |answer| answer.fault_index = vec![0, 1, 3],
        expect!["dma.fault_index: 3 is not an operation of the batch, or not in order"],
    );
    check_results(
        |answer| answer.fault_index = vec![0, 2, 1],
        expect!["dma.fault_index: 1 is not an operation of the batch, or not in order"],
    );
    check_results(
        |answer| answer.fault_index = vec![0, 1, 1],
        expect!["dma.fault_index: 1 is not an operation of the batch, or not in order"],
    );
    check_results(
        |answer| answer.fault_done_bytes[0] = 5,
        expect!["dma.fault_done_bytes: operation 0 did 5 of 4 bytes"],
    );
    check_results(
        |answer| answer.fault_done_bytes[0] = 3,
        expect!["dma.payload: has 0 bytes; the operations give 3"],
    );
    check_results(
        |answer| answer.payload = Bytes::from_static(b"x"),
        expect!["dma.payload: has 1 bytes; the operations give 0"],
    );
}

/// An operation as a test asks it, and how the server is to end it.
#[derive(Clone, Debug)]
struct Asked {
    iova: u64,
    size_bytes: u32,
    kind: u8,
    fill: u8,
    /// Whether it ends with a fault, and after how many bytes of its size.
    fault: Option<u32>,
}

fn asked() -> impl Strategy<Value = Asked> {
    (any::<u64>(), 0_u32..40, 0_u8..6, any::<u8>(), proptest::option::of(0_u32..40))
        .prop_map(|(iova, size_bytes, kind, fill, fault)| Asked { iova, size_bytes, kind, fill, fault })
}

fn add(batch: &mut Batch, asked: &Asked) {
    let (iova, fill) = (Iova::new(asked.iova), asked.fill);
    match asked.kind {
        0 => batch.read(iova, asked.size_bytes),
        1 => batch.write(iova, vec![fill; asked.size_bytes as usize + 1]),
        2 => batch.posted_write(iova, vec![fill; asked.size_bytes as usize + 1]),
        3 => batch.fetch_add(iova, AtomicValue::U64(u64::from(fill))),
        4 => batch.swap(iova, AtomicValue::U32(u32::from(fill))),
        _ => batch.compare_and_swap(iova, AtomicValue::U128(1), AtomicValue::U128(u128::from(fill))),
    };
}

proptest! {
    #[test]
    fn what_a_device_asks_arrives_and_what_the_server_answers_comes_back(all in proptest::collection::vec(asked(), 0..40)) {
        let mut gathered = Batch::new();
        for asked in &all {
            add(&mut gathered, asked);
        }
        let counted_bytes = gathered.bytes();
        let (batch, shape) = gathered.into_message(11);
        let batch = pb::DmaBatch::decode(&*batch.encode_to_vec()).expect("decodes");
        let view = BatchView::parse(&batch, BatchLimits::CONTRACT).expect("our own batch parses");
        prop_assert_eq!(view.len(), all.len());
        prop_assert_eq!(view.payload_bytes() as u64 + u64::from(view.result_bytes()), counted_bytes);

        let mut answer = CompletionsBuilder::new(&view);
        let mut expected = Vec::new();
        for (operation, asked) in view.operations().zip(&all) {
            prop_assert_eq!(operation.iova.get(), asked.iova);
            match operation.action {
                Action::Read => prop_assert_eq!((asked.kind, asked.size_bytes), (0, operation.size_bytes)),
                Action::Write { data, posted } => {
                    prop_assert_eq!(posted, asked.kind == 2);
                    prop_assert_eq!(data, vec![asked.fill; asked.size_bytes as usize + 1]);
                }
                Action::Atomic(AtomicOperation::FetchAdd64(operand)) => prop_assert_eq!(operand, u64::from(asked.fill)),
                Action::Atomic(AtomicOperation::Swap32(operand)) => prop_assert_eq!(operand, u32::from(asked.fill)),
                Action::Atomic(AtomicOperation::Cas128 { compare: 1, new }) => prop_assert_eq!(new, u128::from(asked.fill)),
                other => prop_assert!(false, "{:?} was not asked", other),
            }
            match asked.fault {
                None => {
                    let result = vec![asked.fill; operation.result_bytes() as usize];
                    answer.results().extend_from_slice(&result);
                    expected.push((result, None));
                    answer.succeeded(&operation);
                }
                Some(done) => {
                    let done_bytes = done.min(operation.size_bytes);
                    let fault = DmaFault { done_bytes, iova: operation.iova, reason: Err(Refusal::NoMemory) };
                    let given_bytes = if asked.kind == 0 { done_bytes as usize } else { 0 };
                    answer.results().extend_from_slice(&vec![asked.fill; given_bytes]);
                    expected.push((vec![asked.fill; given_bytes], Some(fault)));
                    answer.failed(&operation, fault);
                }
            }
        }
        let answer = pb::DmaCompletions::decode(&*answer.finish().encode_to_vec()).expect("decodes");
        let completed = shape.complete(answer).expect("the server's answer fits");
        let results: Vec<_> =
            completed.results().map(|result| (result.bytes.to_vec(), result.fault)).collect();
        prop_assert_eq!(results, expected);
    }

    // The stupid twin walks the columns with plain indices and 128-bit sums.
    #[test]
    fn a_batch_parses_exactly_when_its_columns_add_up(
        iova in proptest::collection::vec(any::<u64>(), 0..10),
        size_bytes in proptest::collection::vec(prop_oneof![0_u32..20, Just(u32::MAX)], 0..10),
        kind in proptest::collection::vec(0_u8..8, 0..10),
        shared in any::<[bool; 2]>(),
        surplus_bytes in prop_oneof![3 => Just(0_u128), 1 => 1_u128..3],
    ) {
        let count = iova.len();
        // Most columns are cut to a length that parses.
        let size_bytes = if shared[0] { vec![3] } else { size_bytes[..size_bytes.len().min(count)].to_vec() };
        let kind = if shared[1] { vec![1] } else { kind[..kind.len().min(count)].to_vec() };
        let lengths = (size_bytes.len() == count || size_bytes.len() == 1)
            && (kind.len() <= 1 || kind.len() == count);
        let size_at = |index: usize| u128::from(if size_bytes.len() == 1 { size_bytes[0] } else { size_bytes[index] });
        let kind_at = |index: usize| match kind.len() { 0 => 0, 1 => kind[0], _ => kind[index] };
        let sums = |weights: [u128; 8]| -> u128 {
            let weighted = |index: usize| size_at(index) * weights[usize::from(kind_at(index))];
            if lengths { (0..count).map(weighted).sum() } else { 0 }
        };
        let (taken, given) = (sums([0, 1, 1, 1, 1, 2, 0, 0]), sums([1, 0, 0, 1, 1, 1, 0, 0]));
        // What does not fit a test's memory is over the limit anyway.
        let payload = vec![0x5a; (taken + surplus_bytes).min(1024) as usize];
        let batch = batch(&iova, &size_bytes, &kind, &payload);
        let parses = count <= 8 && lengths && taken == payload.len() as u128 && taken + given <= 256;
        let parsed = BatchView::parse(&batch, LIMITS);
        prop_assert_eq!(parsed.is_ok(), parses, "{:?}", parsed);
        if let Ok(view) = parsed {
            prop_assert_eq!(view.operations().count(), count);
            let results: u32 = view.operations().map(|operation| operation.result_bytes()).sum();
            prop_assert!(results <= view.result_bytes());
        }
    }
}
