//! Virtual machines by hand: `iommuctl`, command after command, in one session.

use iommu_e2e::stage::{Stage, within};
use iommu_types::Owner;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_made_used_and_unmade_by_hand() {
    within(60, async {
        let stage = Stage::start(&["--grace", "20s"]).await;
        let session = stage.server.path("hv0.session");
        let session = session.to_str().expect("UTF-8");
        let iommuctl = async |arguments: &str, expected: i32| {
            let mut all: Vec<&str> = arguments.split(' ').collect();
            all.extend(["--session", session]);
            let (code, out, err) = stage.server.iommuctl(&all).await.expect("it runs");
            assert_eq!(code, expected, "{arguments}: {out}{err}");
            format!("{out}{err}")
        };
        iommuctl("vm create guest1 --number 1", 0).await;
        iommuctl("vm add-memory 1 0x100000 0x4000", 0).await;
        iommuctl("function assign 00:03.0 1", 0).await;
        let list = iommuctl("vm list", 0).await;
        assert!(list.contains("0x100000+0x4000") && list.contains("0000:00:03.0"), "{list}");

        let guest = stage.guest("guest1", 1).await;
        let buffer = guest.allocate(0x4000).await.expect("all of it");
        assert_eq!(buffer.gpa().get(), 0x10_0000);
        assert_eq!(guest.owner(), Owner::Vm(1));
        let limits = stage.inspect().limits(Some(guest.owner())).await.expect("its limits");
        let memory = limits[0].limits.iter().find(|limit| limit.limit == "memory_bytes_per_owner");
        assert_eq!(memory.map(|limit| limit.used), Some(0x4000));

        let twice = iommuctl("vm add-memory 1 0x100000 0x1000", 1).await;
        assert!(twice.contains("has memory at gpa:0x100000 already"), "{twice}");
        iommuctl("vm remove-memory 1 0x100000 0x4000 --how revoke", 0).await;
        iommuctl("function release 00:03.0", 0).await;
        iommuctl("vm destroy 1", 0).await;
        assert!(iommuctl("vm list", 0).await.contains("(none)"));
    })
    .await;
}
