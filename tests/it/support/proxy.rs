//! The network between two parts: it can be cut, slowed down, and reset.

use std::{future::pending, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::PATIENCE;

/// What the network is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Network {
    Good,
    /// Everything arrives so much later, each way.
    Slow(Duration),
    /// Nothing gets through, and nobody says so. What was sent meanwhile arrives afterwards.
    Cut,
    /// Each connection is reset as soon as it is made.
    Down,
}

/// Forwards TCP connections to an address, as well as the network permits.
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    /// How often all connections have been reset.
    resets: watch::Sender<u64>,
    /// What has been sent while the network was cut, in either direction.
    held: watch::Sender<Vec<u8>>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (network, changes) = watch::channel(Network::Good);
        let resets = watch::Sender::new(0);
        let held = watch::Sender::default();
        let (resetting, holding) = (resets.clone(), held.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (changes, resets) = (changes.clone(), resetting.subscribe());
                tokio::spawn(forward(stream, target, changes, resets, holding.clone()));
            }
        });
        Self {
            address,
            network,
            resets,
            held,
            accepting,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on the network is like this.
    pub fn set(&self, network: Network) {
        self.network.send_replace(network);
        if network == Network::Down {
            self.reset();
        }
    }

    /// Resets all connections.
    pub fn reset(&self) {
        self.resets.send_modify(|resets| *resets += 1);
    }

    /// Waits until this has been sent into the cut network.
    pub async fn holds(&self, text: &str) {
        let contains = |held: &Vec<u8>| String::from_utf8_lossy(held).contains(text);
        let mut held = self.held.subscribe();
        let held = timeout(PATIENCE, held.wait_for(contains)).await;
        assert!(held.is_ok(), "{text} was not sent");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.reset();
    }
}

/// Forwards one connection until either side ends it, or it is reset.
async fn forward(
    near: TcpStream,
    target: SocketAddr,
    mut network: watch::Receiver<Network>,
    mut resets: watch::Receiver<u64>,
    held: watch::Sender<Vec<u8>>,
) {
    // Whatever ends it: unless both sides have closed it properly, they learn that it was reset.
    let _ = near.set_zero_linger();
    let _ = near.set_nodelay(true);
    let both = async {
        if *network.borrow() == Network::Down || !can_pass(&mut network).await {
            return;
        }
        let Ok(far) = TcpStream::connect(target).await else {
            return;
        };
        let _ = far.set_zero_linger();
        let _ = far.set_nodelay(true);
        let (near_read, near_write) = near.into_split();
        let (far_read, far_write) = far.into_split();
        tokio::join!(
            pass_on(near_read, far_write, network.clone(), &held),
            pass_on(far_read, near_write, network, &held),
        );
    };
    tokio::select! {
        () = both => {}
        _ = resets.changed() => {}
    }
}

/// How much may be on its way in one direction, in reads.
const CAPACITY: usize = 64;

/// One direction, until there is nothing more to read.
async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut network: watch::Receiver<Network>,
    held: &watch::Sender<Vec<u8>>,
) {
    let (sender, mut on_its_way) = mpsc::channel(CAPACITY);
    let conditions = network.clone();
    let reading = async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let network = *conditions.borrow();
            let delay = match network {
                Network::Slow(delay) => delay,
                Network::Good | Network::Cut | Network::Down => Duration::ZERO,
            };
            if network == Network::Cut {
                held.send_modify(|held| held.extend_from_slice(&buffer[..length]));
            }
            let arrives = Instant::now() + delay;
            let sent = sender.send((arrives, buffer[..length].to_vec()));
            if sent.await.is_err() {
                break;
            }
        }
        drop(sender);
        pending().await
    };
    let writing = async move {
        while let Some((arrives, bytes)) = on_its_way.recv().await {
            sleep_until(arrives).await;
            if !can_pass(&mut network).await || to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        if can_pass(&mut network).await {
            let _ = to.shutdown().await;
        }
    };
    // Writing ends when reading has, and all of it has arrived.
    tokio::select! {
        () = reading => {}
        () = writing => {}
    }
}

/// Waits until the network lets something pass; false if it never will.
async fn can_pass(network: &mut watch::Receiver<Network>) -> bool {
    let state = network.wait_for(|network| *network != Network::Cut).await;
    state.is_ok()
}
