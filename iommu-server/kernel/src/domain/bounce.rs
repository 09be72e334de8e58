//! Shadow buffers: what a device sees of a bounce domain (Markuze, Morrison, Tsafrir, ASPLOS'16).
//!
//! A shadow buffer is memory of nobody's program: mapped once, for one direction, and from then on lent to one mapping after the other. A map
//! takes one of the next size class and copies the buffer into it; an unmap copies back what the device may have written and puts the
//! shadow back. No entry is written and nothing is invalidated on that path. What a device does after an unmap, it does to the
//! shadow.
//!
//! **Promises:** a device never reaches a byte of the owner's buffers (but those mapped as coherent memory or as a resource, which cannot be
//! copied and are mapped strictly). What is not covered by the mapping in its shadow is zeroed at the map, so that nothing of an earlier
//! mapping is seen. A shadow never changes its direction, and the pool has a bound.

use std::collections::{BTreeMap, HashMap};

use iommu_hardware::memory::{MappingRecord, RecordIndex};
use iommu_types::errors::{DmaMapError, IovaExhausted, LimitReached};
use iommu_types::{BouncePool, Direction, Hpa, HpaRange, Iova, PAGE_SIZE_BYTES, PageSize};

use super::find::{Found, direction_of};
use super::request::DmaMap;
use super::table::{Extent, append};
use super::undone::{IovaUse, PendingUnmap, Remains, Revoked};
use super::{Domain, Mode};
use crate::boot::Kernel;
use crate::frames::FrameRun;
use crate::owner_memory::OwnerMemory;

/// Size classes double, so a shadow is at most twice as large as its buffer.
type Class = u32;

/// All shadow buffers of a domain.
#[derive(Debug)]
pub(super) struct Shadows {
    pool: BouncePool,
    bytes: u64,
    /// Those that nobody uses, by class and direction.
    idle: BTreeMap<(Class, u8), Vec<Shadow>>,
    /// Those in use, by the record of the mapping.
    used: HashMap<u32, Bounced>,
}

/// One shadow buffer.
#[derive(Clone, Copy, Debug)]
struct Shadow {
    /// First page of its addresses.
    first: u64,
    class: Class,
    direction: Direction,
    frames: FrameRun,
    /// Of its own permanent mapping.
    record: RecordIndex,
}

impl Shadow {
    fn bytes(&self) -> u64 {
        self.frames.frames * PAGE_SIZE_BYTES
    }
    fn range(&self) -> HpaRange {
        HpaRange::new(self.frames.base, self.bytes()).expect("a shadow lies in memory")
    }
}

/// A mapping and its shadow.
#[derive(Clone, Debug)]
struct Bounced {
    shadow: Shadow,
    /// The frames of the buffer. They are pinned as long as the mapping lives, though no entry leads to them.
    runs: Vec<FrameRun>,
}

/// A part of a buffer and the part of its shadow.
struct Piece {
    buffer: Hpa,
    shadow: Hpa,
    size_bytes: usize,
}

impl Bounced {
    /// The pieces of `size_bytes` bytes from `skip` bytes into the mapping; the mapping begins at `page_offset` in its first page.
    fn pieces(&self, page_offset: u64, skip: u64, size_bytes: u64) -> impl Iterator<Item = Piece> + '_ {
        let (begin, end) = (page_offset + skip, page_offset + skip + size_bytes);
        let mut run_begin = 0;
        self.runs.iter().filter_map(move |run| {
            let run_end = run_begin + run.frames * PAGE_SIZE_BYTES;
            let (from, to) = (begin.max(run_begin), end.min(run_end));
            let at = |base: Hpa, offset: u64| base.checked_add(offset).expect("frames lie in memory");
            let piece = (from < to).then(|| Piece {
                buffer: at(run.base, from - run_begin),
                shadow: at(self.shadow.frames.base, from),
                size_bytes: (to - from) as usize,
            });
            run_begin = run_end;
            piece
        })
    }
}

impl Shadows {
    pub(super) fn new(pool: BouncePool) -> Self {
        Self { pool, bytes: 0, idle: BTreeMap::new(), used: HashMap::new() }
    }
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
    /// One that ends at the page `limit` or below: what the device can address may have shrunk since it was made.
    fn take_idle(&mut self, class: Class, direction: Direction, limit: u64) -> Option<Shadow> {
        let idle = self.idle.get_mut(&(class, direction.permissions().bits()))?;
        let at = idle.iter().rposition(|shadow| shadow.first + (shadow.frames.frames - 1) <= limit)?;
        Some(idle.swap_remove(at))
    }
    fn put_idle(&mut self, shadow: Shadow) {
        self.idle.entry((shadow.class, shadow.direction.permissions().bits())).or_default().push(shadow);
    }
    /// Takes all idle ones out, the largest first, until `bytes` are found.
    fn take_any_idle(&mut self, bytes: u64) -> Vec<Shadow> {
        let (mut taken, mut found) = (Vec::new(), 0);
        for shadows in self.idle.values_mut().rev() {
            while found < bytes
                && let Some(shadow) = shadows.pop()
            {
                found += shadow.bytes();
                taken.push(shadow);
            }
        }
        taken
    }
}

fn shadows_of(mode: &mut Mode) -> &mut Shadows {
    match mode {
        Mode::Bounce(shadows) => shadows,
        _ => unreachable!("only bounce domains have shadows"),
    }
}

impl Domain {
    /// Maps a shadow of the buffer, and copies the buffer into it.
    pub(super) fn map_bounced(
        &mut self,
        kernel: &Kernel,
        memory: &OwnerMemory,
        request: &DmaMap,
    ) -> Result<(Iova, RecordIndex), DmaMapError> {
        self.resolve(memory, request.range)?;
        let runs: Vec<FrameRun> =
            self.extents.iter().map(|extent| FrameRun { base: extent.hpa, frames: extent.pages }).collect();
        let class = request.range.pages_touched().next_power_of_two().trailing_zeros();
        let shadow = self.take_shadow(kernel, class, request.direction)?;
        let bounced = Bounced { shadow, runs };
        let page_offset = request.range.base().page_offset();
        let iova = Iova::new(shadow.first * PAGE_SIZE_BYTES + page_offset);
        self.extents.clear();
        self.extents.extend(bounced.runs.iter().map(|run| Extent {
            iova: Iova::new(0),
            hpa: run.base,
            size: PageSize::Size4K,
            pages: run.frames,
        }));
        let record = self.record_of(request, iova);
        let index = self.pin_frames(kernel).map_err(DmaMapError::from).and_then(|()| {
            let noted = self.note(kernel, &record, |_| {});
            noted.inspect_err(|_| self.unpin_frames(kernel)).map_err(DmaMapError::from)
        });
        let index = index.inspect_err(|_| shadows_of(&mut self.mode).put_idle(shadow))?;
        self.fill_shadow(kernel, &bounced, request, page_offset);
        shadows_of(&mut self.mode).used.insert(index.0, bounced);
        self.ledger.add(iova, index);
        Ok((iova, index))
    }
    /// Zeroes what the mapping does not cover, and copies the buffer, whatever its direction: what a device does not write must come back as it
    /// was.
    fn fill_shadow(&mut self, kernel: &Kernel, bounced: &Bounced, request: &DmaMap, page_offset: u64) {
        let size_bytes = request.range.size_bytes();
        let memory = kernel.memory();
        if request.attributes.skip_cpu_sync {
            memory.zero(bounced.shadow.range()).expect("a shadow lies in memory");
            return;
        }
        let base = bounced.shadow.frames.base;
        let zero = |from: u64, to: u64| {
            let at = base.checked_add(from).expect("a shadow lies in memory");
            if let Ok(slack) = HpaRange::new(at, to - from) {
                memory.zero(slack).expect("a shadow lies in memory");
            }
        };
        zero(0, page_offset);
        zero(page_offset + size_bytes, bounced.shadow.bytes());
        for piece in bounced.pieces(page_offset, 0, size_bytes) {
            memory.copy(piece.buffer, piece.shadow, piece.size_bytes).expect("frames lie in memory");
        }
        self.counters.copied_bytes += size_bytes;
    }
    /// Copies a part of a mapping from or to its shadow; whether it is a bounced one.
    pub(super) fn copy_shadow(
        &mut self,
        kernel: &Kernel,
        record: RecordIndex,
        facts: &MappingRecord,
        skip: u64,
        size_bytes: u64,
        to_device: bool,
    ) {
        let Mode::Bounce(shadows) = &self.mode else { return };
        let Some(bounced) = shadows.used.get(&record.0) else { return };
        for piece in bounced.pieces(facts.gpa % PAGE_SIZE_BYTES, skip, size_bytes) {
            let (from, to) =
                if to_device { (piece.buffer, piece.shadow) } else { (piece.shadow, piece.buffer) };
            kernel.memory().copy(from, to, piece.size_bytes).expect("frames lie in memory");
        }
        self.counters.copied_bytes += size_bytes;
    }
    /// A mapping gives its shadow back, after what the device may have written is copied out.
    pub(super) fn return_shadow(&mut self, kernel: &Kernel, found: &Found, copies: bool) {
        if copies && direction_of(found.facts.permissions) != Direction::ToDevice {
            self.copy_shadow(kernel, found.record, &found.facts, 0, found.facts.size_bytes, false);
        }
        let shadows = shadows_of(&mut self.mode);
        let bounced = shadows.used.remove(&found.record.0).expect("a bounced mapping has a shadow");
        shadows.put_idle(bounced.shadow);
        // No entry ever led to the buffer, so its pins need no drain.
        for frame in bounced.runs.iter().flat_map(|run| run.iter()) {
            kernel.frames.array().unpin(frame);
        }
    }
    /// A shadow of a class, made when none is idle.
    fn take_shadow(
        &mut self,
        kernel: &Kernel,
        class: Class,
        direction: Direction,
    ) -> Result<Shadow, DmaMapError> {
        let limit = self.limit_page();
        let shadows = shadows_of(&mut self.mode);
        if let Some(shadow) = shadows.take_idle(class, direction, limit) {
            return Ok(shadow);
        }
        let bytes = PAGE_SIZE_BYTES << class;
        let over = |shadows: &Shadows| (shadows.bytes + bytes).saturating_sub(shadows.pool.bytes_max);
        let excess = over(shadows);
        if excess > 0 {
            let idle = shadows.take_any_idle(excess);
            let pending = self.revoke_idle(kernel, idle);
            self.evicted.push(pending);
        }
        let shadows = shadows_of(&mut self.mode);
        if over(shadows) > 0 {
            let allowed = shadows.pool.bytes_max;
            return Err(LimitReached { limit: "bounce_bytes".to_owned(), allowed }.into());
        }
        self.account.tables.charge(bytes)?;
        self.make_shadow(kernel, class, direction).inspect_err(|_| self.account.tables.refund(bytes))
    }
    fn make_shadow(
        &mut self,
        kernel: &Kernel,
        class: Class,
        direction: Direction,
    ) -> Result<Shadow, DmaMapError> {
        let (tag, pages) = (self.account.tag(), 1 << class);
        let frames = kernel.frames.allocate_run(pages, tag)?;
        let free_frames = || kernel.frames.free(frames, tag);
        let first = self.iovas.allocate(pages, self.limit_page(), 0);
        let exhausted = IovaExhausted { size_bytes: pages * PAGE_SIZE_BYTES };
        let first = first.ok_or(exhausted).inspect_err(|_| free_frames())?;
        self.extents.clear();
        let iova = Iova::new(first * PAGE_SIZE_BYTES);
        self.extents.push(Extent { iova, hpa: frames.base, size: PageSize::Size4K, pages });
        let record = MappingRecord {
            permissions: direction.permissions().bits(),
            protection: self.protection_code(),
            kind: MappingRecord::KIND_SHADOW,
            domain_id: self.id.get(),
            owner: tag,
            iova: iova.get(),
            size_bytes: pages * PAGE_SIZE_BYTES,
            gpa: 0,
            request_id: 0,
        };
        let granted = self.grant(kernel, &record).inspect_err(|_| {
            self.iovas.free(first, pages, 0);
            free_frames();
        });
        let shadow = Shadow { first, class, direction, frames, record: granted? };
        shadows_of(&mut self.mode).bytes += shadow.bytes();
        Ok(shadow)
    }
    /// Gives every idle shadow back.
    pub(super) fn revoke_idle_shadows(&mut self, kernel: &Kernel, remains: &mut Remains) {
        for shadow in shadows_of(&mut self.mode).take_any_idle(u64::MAX) {
            self.revoke_shadow(kernel, &shadow, remains);
        }
    }
    fn revoke_idle(&mut self, kernel: &Kernel, idle: Vec<Shadow>) -> PendingUnmap {
        let mut remains = self.unfinished.fresh();
        for shadow in idle {
            self.revoke_shadow(kernel, &shadow, &mut remains);
        }
        self.invalidate_now(kernel, remains)
    }
    /// Revokes every shadow. The mappings that used them are revoked already.
    pub(super) fn revoke_shadows(&mut self, kernel: &Kernel, remains: &mut Remains) {
        let shadows = shadows_of(&mut self.mode);
        let mut all = shadows.take_any_idle(u64::MAX);
        for (_, bounced) in std::mem::take(&mut shadows.used) {
            all.push(bounced.shadow);
            bounced.runs.iter().for_each(|run| append(&mut remains.frames, *run));
        }
        for shadow in all {
            self.revoke_shadow(kernel, &shadow, remains);
        }
    }
    fn revoke_shadow(&mut self, kernel: &Kernel, shadow: &Shadow, remains: &mut Remains) {
        let Shadow { first, frames, record, .. } = *shadow;
        let (pages, size_bytes) = (frames.frames, shadow.bytes());
        let iova = IovaUse::Allocated(0);
        self.revoke(kernel, Revoked { first, pages, record, size_bytes, iova }, remains);
        remains.shadows.push(frames);
        shadows_of(&mut self.mode).bytes -= size_bytes;
    }
}
