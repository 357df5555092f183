// Threads that share loops out. OpenMP's would do, but for how they wait: looking on and on, or asleep. Where anything
// else wants a core for a moment, an event loop say, two of a team share the other one, and who waits there keeps it from
// who is waited for; and to be woken takes longer than most loops. These look on, but offer their core to others all the
// time, and sleep after a while without work. What one has not begun of its share when the others are done, they do.

#pragma once

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int LOOPS = 4;  // that one piece of work may have
constexpr auto PATIENCE = std::chrono::milliseconds(2);  // without work until a thread sleeps

inline void look_again(int looks) {
    if (looks % 16 == 0) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
}

template <class Done>
inline void look_until(const Done& done) {
    for (int looks = 1; !done(); ++looks) look_again(looks);
}

struct alignas(64) Count {
    std::atomic<long> value{0};
};

// What the members of a team have in common while they work.
class Common {
   public:
    const int members;

    explicit Common(int members) : members(members), taken_(new Count[LOOPS * members]) {}
    Count* taken(int loop) { return taken_.get() + loop * members; }

    // Until all have come.
    void meet() {
        const long round = round_.value.load();
        if (arrived_.value.fetch_add(1) + 1 == members) {
            arrived_.value.store(0);
            round_.value.store(round + 1);
        } else {
            look_until([&] { return round_.value.load(std::memory_order_acquire) != round; });
        }
    }

    // Before other work.
    void reset() {
        for (long i = 0; i < LOOPS * members; ++i) taken_[i].value.store(0, std::memory_order_relaxed);
    }

   private:
    std::unique_ptr<Count[]> taken_;
    Count arrived_, round_;
};

// One thread of those at a piece of work.
class Member {
   public:
    Member() = default;  // of no team: it does all by itself
    Member(int number, Common& common) : number_(number), common_(&common) {}

    // use(i) for all i of [0, total), each by one member, so many at a time (0: a few times each). Every member comes
    // here, and goes on when there is nothing left to begin.
    template <class Use>
    void each(long total, long at_once, const Use& use) {
        if (common_ == nullptr) {
            for (long i = 0; i < total; ++i) use(i);
            return;
        }
        const int members = common_->members;
        Count* taken = common_->taken(loop_++);
        const long some = at_once > 0 ? at_once : std::max(1L, total / members / 4);
        for (int k = 0; k < members; ++k) {
            const int whose = (number_ + k) % members;
            const long begin = total * whose / members, end = total * (whose + 1) / members;
            for (;;) {
                const long at = begin + taken[whose].value.fetch_add(some, std::memory_order_relaxed);
                if (at >= end) break;
                for (long i = at; i < std::min(end, at + some); ++i) use(i);
            }
        }
    }

    // What all have done so far is there.
    void wait() {
        if (common_ != nullptr) common_->meet();
    }

   private:
    int number_ = 0, loop_ = 0;
    Common* common_ = nullptr;
};

class Team {
   public:
    // The process's. Its threads live as long as that; a forked process gets its own.
    static Team& here() { return *current(); }

    // work(member) by so many threads, the caller among them; by the caller alone while others have the team.
    template <class Work>
    void run(int threads, const Work& work) {
        if (threads <= 1 || busy_.exchange(true)) {
            Member alone;
            return work(alone);
        }
        gather(threads);
        work_ = &work;
        call_ = [](const void* work, Member& member) { (*static_cast<const Work*>(work))(member); };
        left_.value.store(threads - 1);
        for (int i = 0; i < threads - 1; ++i) workers_[i]->call();
        Member member(0, *common_);
        work(member);
        look_until([&] { return left_.value.load(std::memory_order_acquire) == 0; });
        busy_.store(false);
    }

   private:
    // A thread's bell.
    struct alignas(64) Worker {
        std::atomic<long> calls{0}, asleep{0};
        std::mutex mutex;
        std::condition_variable woken;

        void call() {
            calls.fetch_add(1);
            if (asleep.load() == 0) return;  // nor will it sleep without looking once more
            const std::lock_guard<std::mutex> lock(mutex);
            woken.notify_one();
        }

        void wait_beyond(long seen) {
            const auto end = std::chrono::steady_clock::now() + PATIENCE;
            for (int looks = 1; calls.load(std::memory_order_acquire) == seen; ++looks) {
                look_again(looks);
                if (looks % 64 == 0 && std::chrono::steady_clock::now() > end) return sleep_beyond(seen);
            }
        }

        void sleep_beyond(long seen) {
            std::unique_lock<std::mutex> lock(mutex);
            asleep.store(1);
            woken.wait(lock, [&] { return calls.load() != seen; });
            asleep.store(0);
        }
    };

    std::atomic<bool> busy_{false};
    std::vector<std::unique_ptr<Worker>> workers_;
    std::unique_ptr<Common> common_;
    const void* work_ = nullptr;
    void (*call_)(const void*, Member&) = nullptr;
    Count left_;

    static Team*& current() {
        static Team* team = [] {
            pthread_atfork(nullptr, nullptr, [] { current() = new Team; });  // the old one's threads are not here
            return new Team;
        }();
        return team;
    }

    void gather(int threads) {
        if (common_ == nullptr || common_->members != threads) common_ = std::make_unique<Common>(threads);
        else common_->reset();
        while (long(workers_.size()) < threads - 1) {
            workers_.push_back(std::make_unique<Worker>());
            std::thread(&Team::serve, this, long(workers_.size()), workers_.back().get()).detach();
        }
    }

    void serve(long number, Worker* worker) {
        for (long seen = 0;; ++seen) {
            worker->wait_beyond(seen);
            Member member(number, *common_);
            call_(work_, member);
            left_.value.fetch_sub(1, std::memory_order_release);
        }
    }
};

// work(member) by as many threads as torch uses, or by one where it is not worth more.
template <class Work>
inline void together(bool worth_it, const Work& work) {
    if (worth_it) return Team::here().run(omp_get_max_threads(), work);
    Member alone;
    work(alone);
}

// use(i) for all i of [0, total), likewise.
template <class Use>
inline void for_each(bool worth_it, long total, long at_once, const Use& use) {
    together(worth_it, [&](Member& member) { member.each(total, at_once, use); });
}

}  // namespace
