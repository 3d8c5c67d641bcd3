"""Programs in several languages, honest and hostile, for `test_code_programs`.

Each of `SPIES` reads a file's path, a port and a process id, tries what it must not be able to do, and writes the name
of each attempt that succeeded, then "done".
"""

# ruff: noqa: E501

from __future__ import annotations

SUM = {
    "cpp": """
#include <iostream>
int main() { long long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
""",
    "java": """
import java.util.Scanner;
public class Sum {
    public static void main(String[] arguments) {
        Scanner in = new Scanner(System.in);
        System.out.println(in.nextLong() + in.nextLong());
    }
}
""",
    "javascript": """
const [a, b] = require("fs").readFileSync(0, "utf8").split(/\\s+/).map(Number);
console.log(a + b);
""",
    "go": """
package main

import "fmt"

func main() {
	var a, b int
	fmt.Scan(&a, &b)
	fmt.Println(a + b)
}
""",
    "rust": """
use std::io::Read;
fn main() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).unwrap();
    println!("{}", text.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>());
}
""",
}

BROKEN = {
    "cpp": ("int main() { return missing; }", "main.cpp:1:21: error: 'missing' was not declared in this scope"),
    "java": ("class Main { static void main(String[] a) { return missing; } }", "Main.java:1: error: "),
    "javascript": ("let x = ;", "SyntaxError: Unexpected token ';' (main.js:1)"),
    "go": ("package main\nfunc main() { missing() }", "./main.go:2:15: undefined: missing"),
    "rust": ("fn main() { missing(); }", "error[E0425]: cannot find function `missing` in this scope --> main.rs:1:13"),
}

# Asked by the first word of the input what to do, so that each is compiled once.
HUNGRY = {
    "cpp": """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>
int main() {
    std::string what; std::cin >> what;
    volatile unsigned x = 0;
    if (what == "loop") for (;;) x = x + 1;
    if (what == "sleep") sleep(1000);
    if (what == "spin") {
        std::vector<std::thread> all;
        for (int i = 0; i < 4; i++) all.emplace_back([&] { for (;;) x = x + 1; });
        for (auto& t : all) t.join();
    }
    if (what == "memory") {
        int n = 0;
        while (void* p = malloc(1 << 20)) { memset(p, 1, 1 << 20); n++; }
        printf("%d\\n", 64 < n && n < 192); return 0;
    }
    if (what == "shared") for (;;) {
        void* p = mmap(0, 1 << 24, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) return 3;
        memset(p, 1, 1 << 24);
    }
    if (what == "tables") for (long n = 0;; n++) {  // a page of each 2 MiB, for tables of pages
        char* p = (char*)mmap(0, 1L << 30, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) { printf("%d\\n", n < 8); return 0; }
        for (long i = 0; i < 1L << 30; i += 1 << 21) x = x + p[i];
    }
    if (what == "threads") {
        int n = 0;
        try { for (;; n++) std::thread([] { sleep(1000); }).detach(); } catch (...) {}
        printf("%d\\n", n < 200); fflush(stdout); _exit(0);
    }
    if (what == "disk") {
        FILE* f = fopen("/tmp/x", "w"); long n = 0; static char block[1 << 16];
        while (f && fwrite(block, 1, sizeof block, f) == sizeof block && n < 1 << 28) n += sizeof block;
        printf("%d\\n", n <= 16 << 20); return 0;
    }
    if (what == "flood") for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");
    if (what == "errors") for (;;) fputs("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", stderr);
    if (what == "abort") abort();
}
""",
    "java": """
import java.util.*;
class Hungry {
    public static void main(String[] arguments) throws Exception {
        String what = new Scanner(System.in).next();
        List<byte[]> kept = new ArrayList<>();
        if (what.equals("loop")) for (long x = 0;; x++) if (x == -1) return;
        if (what.equals("sleep")) Thread.sleep(1000000);
        if (what.equals("memory")) for (;;) kept.add(new byte[1 << 20]);
        if (what.equals("threads")) {
            int n = 0;
            try {
                for (;; n++) {
                    Thread t = new Thread(() -> { try { Thread.sleep(1000000); } catch (Exception e) {} });
                    t.setDaemon(true);
                    t.start();
                }
            } catch (Throwable e) {}
            System.out.println(n < 200);
            System.out.flush();
            Runtime.getRuntime().halt(0);
        }
        if (what.equals("flood")) for (;;) System.out.println("x".repeat(1000));
        if (what.equals("abort")) throw new IllegalStateException("on purpose");
    }
}
""",
    "javascript": """
const what = require("fs").readFileSync(0, "utf8").trim();
const kept = [];
if (what === "loop") for (;;);
if (what === "sleep") setTimeout(() => {}, 1000000);
if (what === "memory") for (;;) kept.push(Buffer.alloc(1 << 20, 1));
if (what === "objects") for (;;) kept.push({ a: [1, 2, 3] });
if (what === "threads") {
    const { Worker } = require("worker_threads");
    for (let i = 0; i < 1000; i++) kept.push(new Worker("setTimeout(() => {}, 1000000)", { eval: true }));
}
if (what === "flood") for (;;) require("fs").writeSync(1, "x".repeat(1 << 16));
if (what === "abort") throw new Error("on purpose");
""",
    "go": """
package main

import (
	"fmt"
	"os"
	"runtime"
	"time"
)

func main() {
	var what string
	fmt.Scan(&what)
	kept := [][]byte{}
	switch what {
	case "loop":
		for x := 0; ; x++ {
			if x == -1 {
				return
			}
		}
	case "sleep":
		time.Sleep(1000 * time.Second)
	case "memory":
		for {
			block := make([]byte, 1<<20)
			for i := range block {
				block[i] = 1
			}
			kept = append(kept, block)
		}
	case "threads":
		for i := 0; i < 1000; i++ {
			go func() { runtime.LockOSThread(); time.Sleep(1000 * time.Second) }()
			runtime.Gosched()
		}
		time.Sleep(time.Second)
		fmt.Println("1000 threads")
	case "flood":
		for {
			os.Stdout.Write(make([]byte, 1<<16))
		}
	case "abort":
		panic("on purpose")
	}
}
""",
    "rust": """
use std::io::Write;
fn main() {
    let mut what = String::new();
    std::io::stdin().read_line(&mut what).unwrap();
    let mut kept: Vec<Vec<u8>> = Vec::new();
    match what.trim() {
        "loop" => { let mut x = 0u64; loop { x = std::hint::black_box(x + 1); } }
        "sleep" => std::thread::sleep(std::time::Duration::from_secs(1000)),
        "memory" => loop { kept.push(vec![1; 1 << 20]); },
        "threads" => {
            let mut n = 0;
            while std::thread::Builder::new()
                .spawn(|| std::thread::sleep(std::time::Duration::from_secs(1000)))
                .is_ok()
            {
                n += 1;
            }
            println!("{}", n < 200);
        }
        "flood" => loop { std::io::stdout().write_all(&[120; 1 << 16]).unwrap(); },
        "abort" => panic!("on purpose"),
        _ => {}
    }
}
""",
}

SPIES = {
    "cpp": """
#include <arpa/inet.h>
#include <cstdio>
#include <cstdlib>
#include <dirent.h>
#include <fcntl.h>
#include <iostream>
#include <signal.h>
#include <string>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
void say(const char* name, bool done) { if (done) puts(name); }
int main() {
    std::string canary; int port, pid;
    std::cin >> canary >> port >> pid;
    say("read", fopen(canary.c_str(), "r"));
    say("write", fopen(canary.c_str(), "w"));
    say("list", opendir(canary.substr(0, canary.rfind('/')).c_str()));
    say("passwd", fopen("/etc/passwd", "r"));
    say("environment", getenv("ALIGN_CANARY"));
    say("proc", opendir("/proc/self"));
    say("devices", fopen("/dev/zero", "r"));
    say("device modes", chmod("/dev/null", 0600) == 0);
    say("system file", fopen("/usr/bin/as", "r+") || fopen("/usr/lib/x", "w") || fopen("/x", "w"));
    say("program", fopen("/build/program", "r+") || fopen("/build/x", "w") || unlink("/build/program") == 0);
    int s = socket(AF_INET, SOCK_STREAM, 0);
    say("socket", s >= 0);
    sockaddr_in to{}; to.sin_family = AF_INET; to.sin_port = htons(port); to.sin_addr.s_addr = htonl(0x7F000001);
    say("connect", connect(s, (sockaddr*)&to, sizeof to) == 0);
    say("unix socket", socket(AF_UNIX, SOCK_STREAM, 0) >= 0);
    say("kill", kill(pid, 0) == 0 && pid != 1);
    say("kill all", kill(-1, 0) == 0);
    say("fork", fork() >= 0);
    say("vfork", syscall(SYS_clone, 0x4100 | SIGCHLD, 0, 0, 0, 0) >= 0);
    say("system", system("true") == 0);
    say("trace", ptrace(PTRACE_TRACEME, 0, 0, 0) == 0);
    say("namespace", syscall(SYS_unshare, 0x10000000) == 0);
    say("mount", syscall(SYS_mount, "none", "/tmp", "tmpfs", 0, "") == 0);
    say("memfd", syscall(SYS_memfd_create, "x", 0) >= 0);
    say("io_uring", syscall(425, 8, 0) >= 0);
    say("bpf", syscall(321, 0, 0, 0) >= 0);
    say("keyring", syscall(SYS_add_key, "user", "a", "b", 1, -2) >= 0);
    say("shared memory", syscall(29, 0, 4096, 01600) >= 0);
    say("set user", setuid(0) == 0);
    for (int d = 3; d < 1024; d++) if (fcntl(d, F_GETFD) >= 0) printf("descriptor %d\\n", d);
    char* const shell[] = {(char*)"sh", (char*)"-c", (char*)"echo shell", 0};
    execv("/bin/sh", shell);
    puts("done");
}
""",
    "java": """
import java.io.*; import java.net.*; import java.nio.file.*; import java.util.*;
public class Main {
    interface Attempt { void run() throws Exception; }
    static void attempt(String name, Attempt attempt) {
        try { attempt.run(); System.out.println(name); } catch (Throwable refused) { }
    }
    public static void main(String[] arguments) {
        Scanner in = new Scanner(System.in);
        String canary = in.next(); int port = in.nextInt(); long pid = in.nextLong();
        attempt("read", () -> Files.readString(Path.of(canary)));
        attempt("write", () -> Files.writeString(Path.of(canary), "x"));
        attempt("list", () -> Files.list(Path.of(canary).getParent()));
        attempt("passwd", () -> Files.readString(Path.of("/etc/passwd")));
        attempt("program", () -> Files.writeString(Path.of("/build/x"), "x"));
        attempt("connect", () -> new Socket("127.0.0.1", port));
        attempt("listen", () -> new ServerSocket(0));
        attempt("process", () -> new ProcessBuilder("/usr/bin/as", "--version").start());
        if (System.getenv("ALIGN_CANARY") != null) System.out.println("environment");
        System.out.println("done");
    }
}
""",
    "javascript": """
import fs from "fs";
import net from "net";
import child from "child_process";
const [canary, port] = fs.readFileSync(0, "utf8").split(/\\s+/);
function attempt(name, f) { try { f(); console.log(name); } catch (refused) { } }
attempt("read", () => fs.readFileSync(canary));
attempt("write", () => fs.writeFileSync(canary, "x"));
attempt("passwd", () => fs.readFileSync("/etc/passwd"));
attempt("program", () => fs.writeFileSync("/build/main.mjs", "x"));
attempt("process", () => { const done = child.spawnSync(process.execPath, ["--version"]); if (done.error) throw done.error; });
if (process.env.ALIGN_CANARY) console.log("environment");
const socket = net.connect(Number(port), "127.0.0.1", () => { console.log("connect"); socket.end(); });
socket.on("error", () => { console.log("done"); });
""",
    "go": """
package main

import (
	"fmt"
	"os"
	"syscall"
)

func attempt(name string, err error) {
	if err == nil {
		fmt.Println(name)
	}
}

func main() {
	var canary string
	var port, pid int
	fmt.Scan(&canary, &port, &pid)
	_, err := os.ReadFile(canary)
	attempt("read", err)
	attempt("write", os.WriteFile(canary, []byte("x"), 0600))
	_, err = os.ReadFile("/etc/passwd")
	attempt("passwd", err)
	attempt("program", os.WriteFile("/build/x", []byte("x"), 0600))
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	attempt("socket", err)
	attempt("connect", syscall.Connect(s, &syscall.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}))
	_, err = syscall.ForkExec("/build/program", []string{"program"}, nil)
	attempt("process", err)
	if os.Getenv("ALIGN_CANARY") != "" {
		fmt.Println("environment")
	}
	fmt.Println("done")
}
""",
    "rust": """
use std::{fs, net::TcpStream, process::Command};
fn attempt<T, E>(name: &str, result: Result<T, E>) { if result.is_ok() { println!("{}", name); } }
fn main() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    attempt("read", fs::read(words[0]));
    attempt("write", fs::write(words[0], "x"));
    attempt("passwd", fs::read("/etc/passwd"));
    attempt("program", fs::write("/build/x", "x"));
    attempt("connect", TcpStream::connect(("127.0.0.1", words[1].parse::<u16>().unwrap())));
    attempt("process", Command::new("/build/program").spawn());
    attempt("environment", std::env::var("ALIGN_CANARY"));
    println!("done");
}
""",
}

# What takes a file in when it is compiled; each would compile if it could. `{path}` is the file's.
INCLUDING = {
    "cpp": ['#include "{path}"\nint main() {{}}', 'asm(".incbin \\"{path}\\"");\nint main() {{}}'],
    "java": [],
    "javascript": [],
    "go": ['package main\n\nimport _ "embed"\n\n//go:embed {path}\nvar s string\n\nfunc main() {{ print(s) }}',
           'package main\n\n// #include "{path}"\nimport "C"\n\nfunc main() {{}}'],
    "rust": ['fn main() {{ println!("{{}}", include_str!("{path}")); }}', '#[path = "{path}"]\nmod m;\nfn main() {{}}'],
}  # fmt: skip

# Programs that use much of their language and its library: source, input, output.
WIDE = {
    "cpp": (
        """
#include <atomic>
#include <chrono>
#include <fstream>
#include <future>
#include <iomanip>
#include <iostream>
#include <random>
#include <thread>
#include <vector>
using namespace std;
int deep(int n) { volatile int x = n; return n == 0 ? 0 : 1 + deep(x - 1); }
int main() {
    long long sum = 0, x;
    while (cin >> x) sum += x;
    cout << sum << endl;
    vector<thread> threads;
    atomic<int> count{0};
    for (int i = 0; i < 8; i++) threads.emplace_back([&] { count++; });
    for (auto& t : threads) t.join();
    random_device()();
    { ofstream file("/tmp/x"); file << "hi"; }
    string word;
    ifstream("/tmp/x") >> word;
    this_thread::sleep_for(chrono::milliseconds(5));
    cout << count << " " << deep(100000) << " " << word << " " << async(launch::async, [] { return 5; }).get() << endl;
    try { throw runtime_error("thrown"); } catch (exception& e) { cout << e.what() << endl; }
    cout << fixed << setprecision(2) << 3.14159 << endl;
}
""",
        "1 2\n3\n",
        "6\n8 100000 hi 5\nthrown\n3.14\n",
    ),
    "java": (
        """
package some.place;
import java.io.*; import java.math.*; import java.nio.file.*; import java.security.*; import java.time.*;
import java.util.*; import java.util.concurrent.*; import java.util.regex.*; import java.util.stream.*;
record Point(int x, int y) {}
public class Wide {
    static int deep(int n) { return n == 0 ? 0 : 1 + deep(n - 1); }
    public static void main(String[] arguments) throws Exception {
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        long sum = 0;
        for (String line; (line = in.readLine()) != null;)
            for (String word : line.split(" ")) sum += Long.parseLong(word);
        System.out.println(sum + " " + IntStream.range(0, 1000).parallel().sum());
        ExecutorService pool = Executors.newFixedThreadPool(4);
        System.out.println(pool.submit(() -> 42).get() + " " + CompletableFuture.supplyAsync(() -> 7).get());
        pool.shutdown();
        new SecureRandom().nextInt();
        UUID.randomUUID();
        MessageDigest.getInstance("SHA-256").digest(new byte[3]);
        System.out.println(ZonedDateTime.of(2020, 2, 28, 0, 0, 0, 0, ZoneId.of("Europe/Paris")).plusDays(2));
        System.out.println(String.format("%.3f %,d ", 3.14159, 1234567) + new BigInteger("2").pow(100) + new Point(1, 2));
        Path file = Files.createTempFile("x", "y");
        Files.writeString(file, "hi");
        System.out.println(deep(50000) + Files.readString(file) + Pattern.matches("a+b", "aab") + Map.of("\u00fc", 1));
    }
}
""",
        "1 2\n3\n",
        "6 499500\n42 7\n2020-03-01T00:00+01:00[Europe/Paris]\n"
        "3.142 1,234,567 1267650600228229401496703205376Point[x=1, y=2]\n50000hitrue{\u00fc=1}\n",
    ),
    "javascript": (
        """
import crypto from "node:crypto";
import fs from "node:fs";
import readline from "node:readline";
import { Worker } from "node:worker_threads";
let sum = 0n;
for await (const line of readline.createInterface({ input: process.stdin }))
    for (const word of line.split(" ")) sum += BigInt(word);
const deep = n => (n === 0 ? 0 : 1 + deep(n - 1));
await new Promise(resolve => setTimeout(resolve, 10));
fs.writeFileSync("/tmp/x", "hi");
console.log(String(sum), deep(50000), fs.readFileSync("/tmp/x", "utf8"), await fs.promises.readFile("/tmp/x", "utf8"));
console.log(crypto.createHash("md5").digest("hex").slice(0, 4), crypto.randomBytes(3).length);
const worker = new Worker("require('worker_threads').parentPort.postMessage(5)", { eval: true });
worker.on("message", value => process.stdout.write(`${value} ${new Intl.NumberFormat("de").format(1234567.5)}`));
""",
        "1 2\n3\n",
        "6 50000 hi hi\nd41d 3\n5 1.234.567,5\n",
    ),
    "go": (
        """
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"math/big"
	"math/rand"
	"os"
	"regexp"
	"sort"
	"strings"
	"sync"
	"time"
)

type point struct {
	X int `json:"x"`
}

func deep(n int) int {
	if n == 0 {
		return 0
	}
	return 1 + deep(n-1)
}

func main() {
	sum, lines := 0, bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		for _, word := range strings.Fields(lines.Text()) {
			var x int
			fmt.Sscan(word, &x)
			sum += x
		}
	}
	var group sync.WaitGroup
	results := make(chan int, 100)
	for i := 0; i < 100; i++ {
		group.Add(1)
		go func(i int) { defer group.Done(); time.Sleep(time.Millisecond); results <- i }(i)
	}
	group.Wait()
	close(results)
	total := 0
	for x := range results {
		total += x
	}
	text, _ := json.Marshal(point{rand.Intn(1) + 3})
	sorted := []int{3, 1}
	sort.Ints(sorted)
	os.WriteFile("/tmp/x", []byte("hi"), 0600)
	read, _ := os.ReadFile("/tmp/x")
	fnv.New32().Write([]byte("not among the packages that are prepared"))
	fmt.Println(sum, total, string(text), sorted, string(read), deep(1000000), regexp.MustCompile("a+").FindString("caat"))
	fmt.Println(new(big.Int).Exp(big.NewInt(2), big.NewInt(100), nil), time.Date(2020, 2, 30, 0, 0, 0, 0, time.UTC).Month())
}
""",
        "1 2\n3\n",
        '6 4950 {"x":3} [1 3] hi 1000000 aa\n1267650600228229401496703205376 March\n',
    ),
    "rust": (
        """
use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
fn deep(n: u64) -> u64 { if n == 0 { 0 } else { 1 + std::hint::black_box(deep(n - 1)) } }
fn main() {
    let mut sum = 0i64;
    for line in io::stdin().lock().lines() {
        sum += line.unwrap().split_whitespace().map(|w| w.parse::<i64>().unwrap()).sum::<i64>();
    }
    let total = Arc::new(Mutex::new(0));
    let threads: Vec<_> = (0..8).map(|i| { let t = total.clone(); thread::spawn(move || *t.lock().unwrap() += i) }).collect();
    for t in threads { t.join().unwrap(); }
    let (tx, rx) = mpsc::channel();
    thread::Builder::new().stack_size(64 << 20).spawn(move || tx.send(deep(500000)).unwrap()).unwrap();
    std::fs::write("/tmp/x", "hi").unwrap();
    println!("{} {} {} {:?}", sum, total.lock().unwrap(), rx.recv().unwrap(), HashMap::from([("a", 1)]));
    println!("{} {}", deep(100000), std::fs::read_to_string("/tmp/x").unwrap());
    io::stdout().lock().write_all(b"end").unwrap();
    std::process::exit(0);
}
""",
        "1 2\n3\n",
        '6 28 500000 {"a": 1}\n100000 hi\nend',
    ),
}
