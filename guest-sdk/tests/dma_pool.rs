//! A pool of small blocks over coherent memory, against a scripted server.

mod support;

use std::collections::HashSet;

use guest_sdk::errors::OutOfMemory;
use guest_sdk::{DestroyPoolError, DmaPool, Driver, Gpa, GpaRange, Iova, SdkError};
use iommu_proto::pb;
use support::Fake;

fn pool(driver: &Driver, block_bytes: u64, alignment: u64, boundary: u64) -> DmaPool {
    let device = driver.device("0000:00:05.0".parse().expect("an address"));
    DmaPool::new(driver, &device, block_bytes, alignment, boundary).expect("a pool")
}

fn coherent(gpa: u64, iova: u64, size_bytes: u64) -> pb::AllocateCoherentResponse {
    pb::AllocateCoherentResponse { gpa, iova, size_bytes }
}

#[tokio::test]
async fn a_page_is_cut_into_blocks_and_the_next_one_is_taken_when_it_is_full() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("allocate_coherent", coherent(0x4000, 0x8000, 4096))
        .answer("allocate_coherent", coherent(0x7000, 0x9000, 4096));
    let pool = pool(&driver, 1000, 64, 0);
    assert_eq!((pool.block_bytes(), fake.calls("allocate_coherent").len()), (1024, 0));
    let mut blocks = Vec::new();
    for (iova, gpa) in
        [(0x8000, 0x4000), (0x8400, 0x4400), (0x8800, 0x4800), (0x8c00, 0x4c00), (0x9000, 0x7000)]
    {
        let block = pool.alloc().await.expect("a block");
        let range = GpaRange::new(Gpa::new(gpa), 1024).expect("a range");
        assert_eq!((block.iova(), block.range(), block.size_bytes()), (Iova::new(iova), range, 1024));
        blocks.push(block);
    }
    assert_eq!((fake.calls("allocate_coherent").len(), pool.in_use()), (2, 5));
    let asked: Vec<_> = fake.sent::<pb::AllocateCoherentRequest>().iter().map(|ask| ask.size_bytes).collect();
    assert_eq!(asked, [4096, 4096]);
}

#[tokio::test]
async fn a_block_that_is_given_back_is_used_again_and_one_in_use_is_not() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("allocate_coherent", coherent(0x4000, 0x8000, 4096));
    let pool = pool(&driver, 2048, 1, 0);
    let (first, second) = (pool.alloc().await.expect("a block"), pool.alloc().await.expect("a block"));
    let (place, other) = (first.iova(), second.iova());
    first.free();
    let again = pool.alloc().await.expect("a block");
    assert_eq!(again.iova(), place);
    let live = HashSet::from([again.iova(), other]);
    assert_eq!((live.len(), pool.in_use()), (2, 2));
    // One that is dropped is not used again.
    drop(second);
    again.free();
    assert_eq!((pool.alloc().await.expect("a block").iova(), pool.in_use()), (place, 2));
    assert_eq!(fake.calls("allocate_coherent").len(), 1);
}

#[tokio::test]
async fn a_pool_is_destroyed_when_its_blocks_are_back() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    for page in 0..3 {
        fake.answer("allocate_coherent", coherent(0x4000 + page * 4096, 0x8000 + page * 4096, 4096));
    }
    let pool = pool(&driver, 4096, 4096, 4096);
    let mut blocks = Vec::new();
    for _ in 0..3 {
        blocks.push(pool.alloc().await.expect("a block"));
    }
    let (pool, refused) = pool.destroy().await.expect_err("in use");
    assert_eq!(refused, DestroyPoolError::InUse { blocks: 3 });
    assert_eq!(fake.calls("free_coherent").len(), 0, "nothing is freed half-way");
    for block in blocks {
        block.free();
    }
    let gone = guest_sdk::errors::NotMapped { iova: Iova::new(0x8000) };
    fake.refuse("free_coherent", gone.clone());
    let (pool, refused) = pool.destroy().await.expect_err("the first page is refused");
    assert_eq!(refused, DestroyPoolError::Free(SdkError::Refused(gone.into())));
    // The rest is still the pool's.
    fake.answer("free_coherent", pb::FreeCoherentResponse {})
        .answer("free_coherent", pb::FreeCoherentResponse {});
    pool.destroy().await.expect("destroyed");
    let freed: Vec<_> = fake.sent::<pb::FreeCoherentRequest>().iter().map(|free| free.iova).collect();
    assert_eq!(freed, [0x8000, 0x9000, 0xa000]);
}

#[tokio::test]
async fn a_large_block_gets_room_to_be_moved_in_where_pages_are_not_aligned_to_it() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    // 8 KiB at an odd page hold no block that keeps within 8 KiB boundaries.
    fake.answer("allocate_coherent", coherent(0x1000, 0x3000, 8192))
        .answer("allocate_coherent", coherent(0x5000, 0x5000, 20480));
    let pool = pool(&driver, 8192, 1, 8192);
    let block = pool.alloc().await.expect("a block");
    assert_eq!((block.iova(), block.range().base()), (Iova::new(0x6000), Gpa::new(0x6000)));
    let asked: Vec<_> = fake.sent::<pb::AllocateCoherentRequest>().iter().map(|ask| ask.size_bytes).collect();
    assert_eq!(asked, [8192, 20480]);
    // Both allocations are the pool's.
    block.free();
    fake.answer("free_coherent", pb::FreeCoherentResponse {})
        .answer("free_coherent", pb::FreeCoherentResponse {});
    pool.destroy().await.expect("destroyed");
}

#[tokio::test]
async fn what_refuses_the_memory_refuses_the_block() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    let pool = pool(&driver, 64, 1, 0);
    let full = OutOfMemory { size_bytes: 4096 };
    fake.refuse("allocate_coherent", full.clone());
    assert_eq!(pool.alloc().await.expect_err("refused"), SdkError::Refused(full.into()));
    assert_eq!(pool.in_use(), 0);
    pool.destroy().await.expect("nothing to free");
}

#[tokio::test]
async fn two_tasks_take_different_blocks() {
    let fake = Fake::default();
    let driver = fake.driver().await;
    fake.answer("allocate_coherent", coherent(0x4000, 0x8000, 4096))
        .answer("allocate_coherent", coherent(0x5000, 0x9000, 4096));
    let pool = std::sync::Arc::new(pool(&driver, 4096, 1, 0));
    let task = || {
        let pool = std::sync::Arc::clone(&pool);
        tokio::spawn(async move { pool.alloc().await.expect("a block").iova() })
    };
    let (first, second) = (task(), task());
    let taken = HashSet::from([first.await.expect("taken"), second.await.expect("taken")]);
    assert_eq!((taken.len(), pool.in_use()), (2, 2));
}
