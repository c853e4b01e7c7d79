// Changes its heap step by step, each step a function of its number; see `state.rs` for what it is
// asked, and `jvm.rs` for the same computed again.

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.util.HashMap;

public class Heap {
    static final int CHUNK = 1024;
    static final int WORDS = 4 << 20;
    static final int TEXTS = 1 << 16;
    static final long FACTOR = 6364136223846793005L;

    final long[][] chunks = new long[WORDS / CHUNK][CHUNK];
    final HashMap<Integer, String> texts = new HashMap<>();
    long steps = 0;
    long carried = 0;

    public static void main(String[] arguments) throws Exception {
        Heap heap = new Heap();
        Thread worker = new Thread(heap::work, "worker");
        worker.setDaemon(true);
        worker.start();
        try (ServerSocket server = new ServerSocket(7450)) {
            while (true) {
                Socket client = server.accept();
                client.setTcpNoDelay(true);
                new Thread(() -> heap.serve(client), "client").start();
            }
        }
    }

    void work() {
        try {
            while (true) {
                synchronized (this) {
                    for (int count = 0; count < 100; count++) {
                        step();
                    }
                }
                Thread.sleep(2);
            }
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }

    void step() {
        steps++;
        long x = mix(steps);
        int index = (int) Long.remainderUnsigned(x, WORDS);
        int chunk = index / CHUNK;
        if (steps % 16 == 0) {
            // Another object in its place, and garbage.
            chunks[chunk] = chunks[chunk].clone();
        }
        long old = chunks[chunk][index % CHUNK];
        long next = old * FACTOR + x;
        chunks[chunk][index % CHUNK] = next;
        carried += (next - old) * (2L * index + 1);

        int key = (int) (x >>> 48);
        String text = texts.put(key, Long.toUnsignedString(x));
        long before = text == null ? 0 : Long.parseUnsignedLong(text);
        carried += (x - before) * (2L * key + 1);
    }

    long held() {
        long sum = 0;
        for (int index = 0; index < WORDS; index++) {
            sum += chunks[index / CHUNK][index % CHUNK] * (2L * index + 1);
        }
        for (int key = 0; key < TEXTS; key++) {
            String text = texts.get(key);
            if (text != null) {
                sum += Long.parseUnsignedLong(text) * (2L * key + 1);
            }
        }
        return sum;
    }

    synchronized String answer(String question) {
        String state = Long.toUnsignedString(steps) + " " + Long.toUnsignedString(carried);
        if (question.equals("verify")) {
            return state + " " + Long.toUnsignedString(held()) + "\n";
        }
        return state + "\n";
    }

    void serve(Socket client) {
        try (client) {
            BufferedReader questions = new BufferedReader(
                    new InputStreamReader(client.getInputStream(), StandardCharsets.US_ASCII));
            OutputStream answers = client.getOutputStream();
            String question = questions.readLine();
            while (question != null) {
                answers.write(answer(question).getBytes(StandardCharsets.US_ASCII));
                question = questions.readLine();
            }
        } catch (IOException error) {
            // The client sees it.
        }
    }

    static long mix(long number) {
        long x = number * 0x9e3779b97f4a7c15L;
        x = (x ^ (x >>> 30)) * 0xbf58476d1ce4e5b9L;
        x = (x ^ (x >>> 27)) * 0x94d049bb133111ebL;
        return x ^ (x >>> 31);
    }
}
